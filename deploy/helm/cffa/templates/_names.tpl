{{/* Names and what all pods share. */}}
{{- define "cffa.fullname" -}}
{{- if contains "cffa" .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-cffa" .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels that pods are selected by: (dict "root" $ "component" NAME). They may never change. */}}
{{- define "cffa.selector" -}}
app.kubernetes.io/name: cffa
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "cffa.labels" -}}
{{ include "cffa.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{/* (dict "root" $ "image" IMAGE "suffix" SUFFIX): by digest where one is given; the default tag is the app's version. */}}
{{- define "cffa.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ .image.tag | default (printf "%s%s" .root.Chart.AppVersion .suffix) }}
{{- end -}}
{{- end -}}

{{- define "cffa.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "cffa.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* Where the servers are; the passwords are files. */}}
{{- define "cffa.settings" -}}
- {name: CFFA_MODE, value: cluster}
- {name: CFFA_HOME, value: /var/lib/cffa}
- {name: CFFA_SECRETS_DIR, value: /run/secrets/cffa}
- {name: CFFA_HOST, value: "0.0.0.0"}
- {name: CFFA_DATABASE_URL, value: {{ .Values.database.url | quote }}}
- {name: CFFA_BROKER_URL, value: {{ .Values.broker.url | quote }}}
- {name: CFFA_S3_ENDPOINT, value: {{ .Values.s3.endpoint | quote }}}
- {name: CFFA_S3_PUBLIC_ENDPOINT, value: {{ .Values.s3.publicEndpoint | quote }}}
- {name: CFFA_S3_BUCKET, value: {{ .Values.s3.bucket | quote }}}
- {name: CFFA_S3_REGION, value: {{ .Values.s3.region | quote }}}
- {name: CFFA_OWNER_RUNNING_UNITS, value: {{ .Values.ownerRunningUnits | quote }}}
{{- range $name, $value := .Values.extraSettings }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end -}}

{{/* The Secret as files: (dict "root" $ "keys" (list NAME...)). A container gets the keys it needs. */}}
{{- define "cffa.secretVolume" -}}
- name: secrets
  secret:
    secretName: {{ .root.Values.existingSecret }}
    defaultMode: 0440
    items:
    {{- range .keys }}
      - {key: {{ . }}, path: {{ . }}}
    {{- end }}
{{- end -}}

{{- define "cffa.mounts" -}}
- {name: secrets, mountPath: /run/secrets/cffa, readOnly: true}
- {name: scratch, mountPath: /var/lib/cffa}
- {name: tmp, mountPath: /tmp}
{{- end -}}

{{/* (dict "root" $ "kinds" KINDS): waiting and running units in PromQL. Each replica of the API reports the same. */}}
{{- define "cffa.load" -}}
{{- $kinds := .kinds | default ".+" | replace "," "|" -}}
sum(max by (kind) (cffa_queue_load{namespace="{{ .root.Release.Namespace }}",service="{{ include "cffa.fullname" .root }}-api",kind=~"{{ $kinds }}"}))
{{- end -}}
