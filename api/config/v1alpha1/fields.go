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
		list = append(list, Field{Path: prefix + name, Live: declared.Tag.Get("apply") == "live", Value: in.Field(i).Interface(), Of: t, Name: declared.Name})
	}
	return list
}
