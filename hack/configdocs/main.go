// Command configdocs writes docs/configuration.md from the types of the configuration files and their comments.
//
//	go run ./hack/configdocs > docs/configuration.md
package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"strings"

	config "github.com/serviceproxy/serviceproxy-operator/api/config/v1alpha1"
)

func main() {
	text, err := render(filepath.Join("api", "config", "v1alpha1"))
	if err != nil {
		fmt.Fprintln(os.Stderr, "configdocs:", err)
		os.Exit(1)
	}
	fmt.Print(text)
}

const intro = `# Configuration files

<!-- Written by hack/configdocs from api/config/v1alpha1. Do not edit: change the comments there and run make generate. -->

The agent and the controller read a file that ` + "`--config`" + ` names. In a cluster it is in the ConfigMap ` + "`serviceproxy-agent`" + ` or ` + "`serviceproxy-controller-HASH`" + `,
made from [config/agent/agent.yaml](../config/agent/agent.yaml) and [config/manager/controller.yaml](../config/manager/controller.yaml). Flags that are given win over the file
(` + "`-h`" + ` lists them), the file wins over environment variables, and these win over defaults.

- ` + "`--print-config`" + ` prints what file, flags, environment and defaults make, as a file that would give the same, and exits. ` + "`/configz`" + ` at ` + "`metricsBindAddress`" + `
  shows what is in force in a running program.
- A file is read strictly. A field that is unknown or given twice, a value of the wrong type or one that cannot be meant keeps the program from starting. All problems are told at
  once, each with the field, its value and what would be valid:

      --config /etc/serviceproxy/agent.yaml: metricsBindAdress: Unknown field, did you mean metricsBindAddress?
      --config /etc/serviceproxy/agent.yaml: clusterCIDR[1]: Invalid value: "10.244.0.0": must be a CIDR such as 10.244.0.0/16

- Names are those of KubeProxyConfiguration where it has the same thing. ` + "`clusterCIDR`" + ` is a list, because there may be several.

## A change while an agent runs

Agents look at their file every 2 seconds and take it in when it has settled; the kubelet takes up to a minute to bring a changed ConfigMap to a node. Fields marked *live* take effect at
once, and connections go on. The others are logged as ` + "`A part of the configuration file takes effect after a restart`" + ` and listed at ` + "`/configz`" + ` as ` + "`source.afterRestart`" + `. A file that is wrong, or
gone, changes nothing: the log says what is wrong, ` + "`source.problem`" + ` at ` + "`/configz`" + ` too, and these metrics tell of it:

| Metric | |
|---|---|
| ` + "`serviceproxy_agent_config_last_reload_successful`" + ` | 1, or 0 if the file as it is now cannot be used |
| ` + "`serviceproxy_agent_config_last_reload_success_timestamp_seconds`" + ` | when it was last taken in |
| ` + "`serviceproxy_agent_config_fields_after_restart`" + ` | how many changed fields wait for a restart |

The controller reads its file when it starts.

## What is served at metricsBindAddress

| Path | |
|---|---|
| ` + "`/metrics`" + ` | [metrics](metrics.md) |
| ` + "`/metrics/services`" + ` | of an agent: traffic of each Service, with ` + "`countTraffic: true`" + ` |
| ` + "`/proxyMode`" + ` | of an agent: the proxy modes that carry services on this node now, as kube-proxy spells them, sorted, with commas between: ` + "`nftables`" + `, ` + "`iptables,nftables`" + `; ` + "`none`" + ` if there are no services |
| ` + "`/configz`" + ` | the configuration in force |
| ` + "`/debug/pprof/`" + ` | Go's profiles, with ` + "`enableProfiling: true`" + ` only |

Any other path is answered with the list of those that there are.
`

// render gives the page, made from the package in the folder.
func render(folder string) (string, error) {
	comments, err := read(folder)
	if err != nil {
		return "", err
	}
	var out strings.Builder
	out.WriteString(intro)
	agent := &config.AgentConfiguration{}
	agent.SetDefaults()
	fmt.Fprintf(&out, "\n## %s\n\n    apiVersion: %s\n    kind: %s\n\n| Field | Change | |\n|---|---|---|\n", config.AgentKind, config.GroupVersion, config.AgentKind)
	for _, f := range config.Fields(agent) {
		change := "restart"
		if f.Live {
			change = "live"
		}
		fmt.Fprintf(&out, "| `%s` | %s | %s |\n", f.Path, change, comments[key(f)])
	}
	controller := &config.ControllerConfiguration{}
	controller.SetDefaults()
	fmt.Fprintf(&out, "\n## %s\n\n    apiVersion: %s\n    kind: %s\n\n| Field | |\n|---|---|\n", config.ControllerKind, config.GroupVersion, config.ControllerKind)
	for _, f := range config.Fields(controller) {
		fmt.Fprintf(&out, "| `%s` | %s |\n", f.Path, comments[key(f)])
	}
	return out.String(), nil
}

// key is what read calls a field.
func key(f config.Field) string { return f.Of.Name() + "." + f.Name }

// read gives the comments of all fields of the structs in a folder's Go files, each as one line.
func read(folder string) (map[string]string, error) {
	files, err := filepath.Glob(filepath.Join(folder, "*.go"))
	if err != nil {
		return nil, err
	}
	comments := map[string]string{}
	for _, name := range files {
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ParseComments)
		if err != nil {
			return nil, err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			declared, ok := n.(*ast.TypeSpec)
			if !ok {
				return true
			}
			if fields, ok := declared.Type.(*ast.StructType); ok {
				for _, f := range fields.Fields.List {
					for _, name := range f.Names {
						comments[declared.Name.Name+"."+name.Name] = strings.Join(strings.Fields(f.Doc.Text()), " ")
					}
				}
			}
			return false
		})
	}
	return comments, nil
}

// shown is how a comment writes a default; empty if it needs words.
func shown(value any) string {
	switch v := reflect.ValueOf(value); {
	case v.Kind() == reflect.Pointer && v.IsNil():
		return ""
	case v.Kind() == reflect.Pointer:
		return shown(v.Elem().Interface())
	case v.Kind() == reflect.Slice && v.Len() == 0:
		return ""
	}
	text := fmt.Sprint(value)
	for _, zero := range []string{"m0s", "h0m"} {
		if strings.HasSuffix(text, zero) {
			text = strings.TrimSuffix(text, zero[1:])
		}
	}
	return text
}
