{{- define "egressbpf.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "egressbpf.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains (include "egressbpf.name" .) .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "egressbpf.name" .) | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "egressbpf.selectorLabels" -}}
app.kubernetes.io/name: {{ include "egressbpf.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "egressbpf.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "egressbpf.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "egressbpf.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- .Values.serviceAccount.name | default (include "egressbpf.fullname" .) }}
{{- else }}
{{- .Values.serviceAccount.name | default "default" }}
{{- end }}
{{- end }}

{{- define "egressbpf.image" -}}
{{- if .Values.image.digest }}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) }}
{{- end }}
{{- end }}

{{/* config.yaml. The user's own rules for containers come first, since the first that matches holds. */}}
{{- define "egressbpf.config" -}}
{{- $config := deepCopy .Values.config }}
{{- $rules := $config.containers | default list }}
{{- range .Values.exempt.namespaces }}
{{- $rules = append $rules (dict "namespace" . "metadata" "allow" "socket_families" "any") }}
{{- end }}
{{- if $rules }}
{{- $_ := set $config "containers" $rules }}
{{- end }}
{{- /* To YAML 1.1, on and off are true and false; egressbpf wants the words. */}}
{{- if kindIs "bool" $config.host_side }}
{{- $_ := set $config "host_side" (ternary "on" "off" $config.host_side) }}
{{- end }}
{{- toYaml $config }}
{{- end }}

{{/* Targets of notifications have secrets in their URLs. */}}
{{- define "egressbpf.configKind" -}}
{{- if .Values.config.notify }}Secret{{ else }}ConfigMap{{ end }}
{{- end }}

{{- define "egressbpf.securityContext" -}}
privileged: false
# Although SYS_ADMIN is among the capabilities: processes of the container get no others.
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsUser: 0
runAsGroup: 0
capabilities:
  drop: [ALL]
  add:
    - SYS_ADMIN
    - NET_ADMIN
    - DAC_READ_SEARCH
    - SYS_PTRACE
    {{- if and .Values.metrics.enabled (eq .Values.operation "run") }}
    # For the process that serves the page and metrics, which has none of them.
    - SETUID
    - SETGID
    - SETPCAP
    - KILL
    - DAC_OVERRIDE
    {{- end }}
    {{- range .Values.extraCapabilities }}
    - {{ . }}
    {{- end }}
seccompProfile:
  type: RuntimeDefault
{{- if include "egressbpf.appArmorField" . }}
# The runtimes' own profiles deny what the agent reads of other processes.
appArmorProfile:
  type: Unconfined
{{- end }}
{{- with .Values.seLinuxOptions }}
seLinuxOptions:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Before Kubernetes 1.30, AppArmor's profile is an annotation. */}}
{{- define "egressbpf.appArmorField" -}}
{{- if semverCompare ">=1.30-0" .Capabilities.KubeVersion.Version }}true{{ end }}
{{- end }}

{{- define "egressbpf.validate" -}}
{{- if and .Values.metrics.enabled (not .Values.metrics.webConfigSecret) (not .Values.metrics.plain) }}
{{- fail "metrics.enabled: metrics and the page show where containers connect to. Name a Secret with TLS and users in metrics.webConfigSecret, or set metrics.plain to true" }}
{{- end }}
{{- if and (or .Values.metrics.service.enabled .Values.metrics.podMonitor.enabled) (not .Values.metrics.enabled) }}
{{- fail "metrics.service and metrics.podMonitor: want metrics.enabled too" }}
{{- end }}
{{- if and (not .Values.configSecret) (eq .Values.operation "run") }}
{{- range $exempt := .Values.exempt.namespaces }}
{{- $first := "" }}
{{- range $rule := $.Values.config.containers }}
{{- if and (not $first) (kindIs "map" $rule) }}
{{- if and (eq (len (omit $rule "metadata" "socket_families" "smtp")) 1) $rule.namespace }}
{{- if regexMatch (printf "^%s$" ($rule.namespace | replace "." "[.]" | replace "*" ".*")) $exempt }}
{{- /* One that says the same is as good. */}}
{{- $first = ternary $exempt $rule.namespace (and (eq (toString $rule.metadata) "allow") (eq (toString $rule.socket_families) "any")) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- if contains "*" $first }}
{{- fail (printf "exempt.namespaces: %s is not exempt, since config.containers has a rule for all pods of namespace %q before it. Put a rule for %s in front of that, or take it out of exempt.namespaces" $exempt $first $exempt) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
