{{/*
What the operator may do to the objects of tiers. No Secrets, no pods but to read and to relabel, nothing cluster-scoped; in
cluster mode the one thing more is to bind the routers' fixed ClusterRole.
*/}}
{{- define "servingtiers.rules" -}}
{{- $cluster := eq .Values.mode "cluster" -}}
{{- $perTier := not (or $cluster .Values.routers.sharedServiceAccount) -}}
- apiGroups: [servingtiers.io]
  resources: [servingtiers, tierpools]
  verbs: [get, list, watch]
- apiGroups: [servingtiers.io]
  resources: [servingtiers/status, tierpools/status]
  verbs: [patch]
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [services]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch, create, patch, delete]
{{- if $perTier }}
# Each tier's routers get an account that may read pods: part of what the operator itself holds.
- apiGroups: [""]
  resources: [serviceaccounts]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [rbac.authorization.k8s.io]
  resources: [roles, rolebindings]
  verbs: [get, list, watch, create, patch, delete]
{{- else if $cluster }}
# Each tier's routers get an account and a binding to the one role that may be bound. Roles are made no more: those
# of tiers from namespaced mode are cleared away.
- apiGroups: [""]
  resources: [serviceaccounts]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [rbac.authorization.k8s.io]
  resources: [rolebindings]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [rbac.authorization.k8s.io]
  resources: [roles]
  verbs: [get, list, watch, delete]
- apiGroups: [rbac.authorization.k8s.io]
  resources: [clusterroles]
  resourceNames: [servingtiers-router]
  verbs: [bind]
{{- else }}
# The routers' account comes with the chart. Accounts that were made for single tiers before are cleared away.
- apiGroups: [""]
  resources: [serviceaccounts]
  verbs: [get, list, watch, delete]
- apiGroups: [rbac.authorization.k8s.io]
  resources: [roles, rolebindings]
  verbs: [get, list, watch, delete]
{{- end }}
# Tiers of a TierPool lend each other engines by a label of their pods. With admission.routingLabels the API server sees
# to it that nothing but metadata is changed.
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, patch]
# Another autoscaler on the same Deployment is a conflict to be reported.
- apiGroups: [autoscaling]
  resources: [horizontalpodautoscalers]
  verbs: [list, watch]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create]
{{- end -}}
