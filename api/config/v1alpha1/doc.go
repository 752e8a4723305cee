// Package v1alpha1 holds the configuration files of the two programs, group config.networking.serviceproxy.io.
//
// A file is read strictly: a field that is unknown, given twice or of the wrong type is an error, and so is every value that cannot be meant. An error
// names the field, its value and what would be valid. Where KubeProxyConfiguration has the same thing, it has the same name here.
//
// A field with the tag `apply:"live"` takes effect in a running agent when its file changes, any other after a restart. A controller reads its file once.
package v1alpha1

import "k8s.io/apimachinery/pkg/runtime/schema"

// GroupVersion identifies these files: config.networking.serviceproxy.io/v1alpha1.
var GroupVersion = schema.GroupVersion{Group: "config.networking.serviceproxy.io", Version: "v1alpha1"}
