package v1alpha1

import (
	"reflect"
	"strings"
)

// Field is one setting of a configuration.
type Field struct {
	// Path is how a file and messages name it, such as conntrack.min.
	Path string
	// Live says that an agent takes a change of it in while it runs.
	Live bool
	// Value is what the configuration has for it.
	Value any
	// Of and Name say where the Go type declares it.
	Of   reflect.Type
	Name string

	in reflect.Value // the configuration's own
}

// Fields gives the settings of the configuration that a pointer points to, in the order of their declaration. apiVersion and kind are none.
func Fields(configuration any) []Field {
	return appendFields(nil, "", reflect.ValueOf(configuration).Elem())
}

func appendFields(list []Field, prefix string, in reflect.Value) []Field {
	t := in.Type()
	for i := range t.NumField() {
		declared := t.Field(i)
		if declared.Anonymous {
			continue // apiVersion and kind
		}
		name, _, _ := strings.Cut(declared.Tag.Get("json"), ",")
		if declared.Type.Kind() == reflect.Struct && declared.Type != reflect.TypeFor[Duration]() {
			list = appendFields(list, prefix+name+".", in.Field(i))
			continue
		}
		list = append(list, Field{Path: prefix + name, Live: declared.Tag.Get("apply") == "live", Value: in.Field(i).Interface(), Of: t, Name: declared.Name, in: in.Field(i)})
	}
	return list
}

// Adopt takes over into the running configuration what another one of the same type has for its live fields. It gives the paths of the fields that changed so, and of those that
// differ and wait for a restart.
func Adopt(running, wanted any) (adopted, waiting []string) {
	theirs := Fields(wanted)
	for i, ours := range Fields(running) {
		switch {
		case reflect.DeepEqual(ours.Value, theirs[i].Value):
		case ours.Live:
			ours.in.Set(theirs[i].in)
			adopted = append(adopted, ours.Path)
		default:
			waiting = append(waiting, ours.Path)
		}
	}
	return adopted, waiting
}
