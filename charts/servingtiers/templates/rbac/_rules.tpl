{{/*
What the operator may do to the objects of tiers. No Secrets, no pods but to read, nothing cluster-scoped; in
cluster mode the one thing more is to bind the routers' fixed ClusterRole.
*/}}
{{- define "servingtiers.rules" -}}
{{- $cluster := eq .Values.mode "cluster" -}}
{{- $perTier := not (or $cluster .Values.routers.sharedServiceAccount) -}}
- apiGroups: [servingtiers.io]
  resources: [servingtiers]
  verbs: [get, list, watch]
- apiGroups: [servingtiers.io]
  resources: [servingtiers/status]
  verbs: [patch]
# Children name their tier as controlling owner with blockOwnerDeletion, which
# OwnerReferencesPermissionEnforcement allows only to those who may do this.
- apiGroups: [servingtiers.io]
  resources: [servingtiers/finalizers]
  verbs: [update]
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
# Each tier's routers get an account that may read pods: what the operator itself holds, and no more.
- apiGroups: [""]
  resources: [serviceaccounts]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [rbac.authorization.k8s.io]
  resources: [roles, rolebindings]
  verbs: [get, list, watch, create, patch, delete]
# `get` is not the operator's need but the routers': nobody may grant what he does not hold.
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch]
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
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
{{- else }}
# The routers' account comes with the chart. Accounts that were made for single tiers before are cleared away.
- apiGroups: [""]
  resources: [serviceaccounts]
  verbs: [get, list, watch, delete]
- apiGroups: [rbac.authorization.k8s.io]
  resources: [roles, rolebindings]
  verbs: [get, list, watch, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
{{- end }}
# Another autoscaler on the same Deployment is a conflict to be reported.
- apiGroups: [autoscaling]
  resources: [horizontalpodautoscalers]
  verbs: [list, watch]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create]
{{- end -}}
