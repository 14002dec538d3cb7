{{/* Prefix of all names; leaves room for suffixes in 63 characters. */}}
{{- define "servingtiers.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trimSuffix "-" -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "servingtiers.operatorName" -}}
{{- include "servingtiers.fullname" . }}-operator
{{- end -}}

{{- define "servingtiers.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (include "servingtiers.operatorName" .) -}}
{{- end -}}

{{/* Name of the routers' account in each watched namespace; empty where the operator makes one for each tier. */}}
{{- define "servingtiers.routerAccount" -}}
{{- if and (eq .Values.mode "namespaced") .Values.routers.sharedServiceAccount -}}
{{- include "servingtiers.fullname" . }}-router
{{- end -}}
{{- end -}}

{{/* Labels of the operator's pods. NetworkPolicies of the tiers know the operator by name and component. */}}
{{- define "servingtiers.selectorLabels" -}}
app.kubernetes.io/name: servingtiers
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{- define "servingtiers.labels" -}}
app.kubernetes.io/name: servingtiers
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "servingtiers.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{/* Watched namespaces as a JSON list: of namespaced mode. */}}
{{- define "servingtiers.namespaces" -}}
{{- .Values.watchNamespaces | default (list .Release.Namespace) | toJson -}}
{{- end -}}

{{/* The operator's configuration: the values with what the mode decides. */}}
{{- define "servingtiers.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- if eq .Values.mode "cluster" -}}
{{- $_ := set $config "clusterMode" true -}}
{{- else if .Values.watchNamespaces -}}
{{- $_ := set $config "namespaces" .Values.watchNamespaces -}}
{{- end -}}
{{- with include "servingtiers.routerAccount" . -}}
{{- $_ := set $config "routerServiceAccount" . -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}

{{/* What the schema cannot see; the message states the mend. */}}
{{- define "servingtiers.validate" -}}
{{- if and (eq .Values.mode "cluster") .Values.watchNamespaces -}}
{{- fail "mode: cluster watches every namespace: empty watchNamespaces, or set mode: namespaced" -}}
{{- end -}}
{{- $telemetry := .Values.config.telemetry | default dict -}}
{{- if and (eq ($telemetry.source | default "Scrape") "Prometheus") (not $telemetry.prometheus) -}}
{{- fail "config.telemetry.source is Prometheus: set config.telemetry.prometheus.url, or source: Scrape" -}}
{{- end -}}
{{- if and .Values.metrics.podMonitor.enabled (eq ($telemetry.source | default "Scrape") "Scrape") (not .Values.config.metricsNamespace) -}}
{{- fail "metrics.podMonitor: the NetworkPolicies of the tiers let no Prometheus in: set config.metricsNamespace to its namespace" -}}
{{- end -}}
{{- $lease := .Values.operator.lease -}}
{{- if not (and (lt (int $lease.retrySeconds) (int $lease.renewDeadlineSeconds)) (lt (int $lease.renewDeadlineSeconds) (int $lease.durationSeconds))) -}}
{{- fail "operator.lease: retrySeconds must be below renewDeadlineSeconds, and that below durationSeconds" -}}
{{- end -}}
{{- end -}}

{{/* The restricted Pod Security Standard. */}}
{{- define "servingtiers.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "servingtiers.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Node labels by which accelerators are told apart, for a column of kubectl. */}}
{{- define "servingtiers.nodeLabels" -}}
{{- $labels := dict -}}
{{- range .Values.config.accelerators -}}
{{- range $key, $_ := .nodeSelector -}}
{{- $_ := set $labels $key true -}}
{{- end -}}
{{- end -}}
{{- keys $labels | sortAlpha | join "," | default "kubernetes.io/arch" -}}
{{- end -}}
