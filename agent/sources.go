package agent

import (
	"fmt"
	"net/http"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"github.com/serviceproxy/serviceproxy-operator/agent/compile"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// object is the compact form of an API object with the little of its metadata that the agent needs.
type object[T any] struct {
	name            types.NamespacedName
	resourceVersion string
	// trigger is when the change behind an EndpointSlice happened; zero if unknown.
	trigger time.Time
	value   *T
}

// feed takes in what a watch delivers.
type feed[T any] interface {
	put(*object[T])
	remove(name types.NamespacedName, resourceVersion string)
	// replace says what there is; what is not in the list is gone. resourceVersion is the whole list's.
	replace(list []*object[T], resourceVersion string)
	// bookmark says that everything up to resourceVersion has been delivered.
	bookmark(resourceVersion string)
}

// reflectorStore makes a feed into the store of a client-go reflector, which alone decides when to list, to watch and to retry: an
// error never reaches the feed. Objects are made compact one by one as they come off the wire, so that never more than a few exist in full.
type reflectorStore[T any] struct {
	feed  feed[T]
	parse func(metav1.Object) *object[T]
}

var (
	_ cache.TransformingStore      = (*reflectorStore[int])(nil)
	_ cache.ReflectorBookmarkStore = (*reflectorStore[int])(nil)
)

// compact gives the compact form of what a reflector hands over: an API object, or what Transformer made of it before.
func (s *reflectorStore[T]) compact(obj any) (*object[T], error) {
	switch o := obj.(type) {
	case *object[T]:
		return o, nil
	case metav1.Object:
		return s.parse(o), nil
	}
	return nil, fmt.Errorf("a watch delivered %T, which is no API object", obj)
}

func (s *reflectorStore[T]) Transformer() cache.TransformFunc {
	return func(obj any) (any, error) { return s.compact(obj) }
}

func (s *reflectorStore[T]) Add(obj any) error {
	o, err := s.compact(obj)
	if err == nil {
		s.feed.put(o)
	}
	return err
}

func (s *reflectorStore[T]) Update(obj any) error { return s.Add(obj) }

func (s *reflectorStore[T]) Delete(obj any) error {
	o, ok := obj.(metav1.Object)
	if !ok {
		return fmt.Errorf("a watch delivered the deletion of %T, which is no API object", obj)
	}
	s.feed.remove(nameOf(o), o.GetResourceVersion())
	return nil
}

func (s *reflectorStore[T]) Replace(list []any, resourceVersion string) error {
	objects := make([]*object[T], 0, len(list))
	for i := range list {
		o, err := s.compact(list[i])
		if err != nil {
			return err
		}
		objects = append(objects, o)
	}
	s.feed.replace(objects, resourceVersion)
	return nil
}

func (s *reflectorStore[T]) Bookmark(resourceVersion string) error {
	s.feed.bookmark(resourceVersion)
	return nil
}

func (s *reflectorStore[T]) Resync() error { return nil }

func nameOf(o metav1.Object) types.NamespacedName {
	return types.NamespacedName{Namespace: o.GetNamespace(), Name: o.GetName()}
}

// parser makes the function that makes objects compact. What an object holds that cannot be understood is logged here, once per version of the object, and left out.
func parser[O metav1.Object, T any](log logr.Logger, kind string, parse func(O) (*T, []compile.Problem)) func(metav1.Object) *object[T] {
	return func(in metav1.Object) *object[T] {
		value, problems := parse(in.(O))
		for _, p := range problems {
			log.Error(p, "Left out a part of an object that cannot be understood", "kind", kind, "object", nameOf(in).String(),
				"resourceVersion", in.GetResourceVersion(), "field", p.Field, "value", p.Value)
		}
		return &object[T]{name: nameOf(in), resourceVersion: in.GetResourceVersion(), trigger: triggerOf(in), value: value}
	}
}

func triggerOf(o metav1.Object) time.Time {
	if _, ok := o.(*discoveryv1.EndpointSlice); !ok {
		return time.Time{}
	}
	at, err := time.Parse(time.RFC3339Nano, o.GetAnnotations()[corev1.EndpointsLastChangeTriggerTime])
	if err != nil {
		return time.Time{} // absent, or not set by the EndpointSlice controller
	}
	return at
}

// clients are REST clients for just the groups the agent needs, on one connection. A full clientset would cost it ten times their memory.
type clients struct {
	core, discovery, serviceproxy *rest.RESTClient
}

func newClients(config *rest.Config) (*clients, error) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, discoveryv1.AddToScheme, v1alpha1.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, err
		}
	}
	config = rest.CopyConfig(config)
	config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	httpClient, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, err
	}
	const json, protobuf = runtime.ContentTypeJSON, runtime.ContentTypeProtobuf
	var out clients
	for _, c := range []struct {
		to          **rest.RESTClient
		group       schema.GroupVersion
		path        string
		contentType string
	}{
		{&out.core, corev1.SchemeGroupVersion, "/api", protobuf},
		{&out.discovery, discoveryv1.SchemeGroupVersion, "/apis", protobuf},
		{&out.serviceproxy, v1alpha1.GroupVersion, "/apis", json},
	} {
		if *c.to, err = newClient(config, httpClient, c.group, c.path, c.contentType); err != nil {
			return nil, fmt.Errorf("client for %s: %w", c.group, err)
		}
	}
	return &out, nil
}

func newClient(config *rest.Config, httpClient *http.Client, group schema.GroupVersion, path, contentType string) (*rest.RESTClient, error) {
	config = rest.CopyConfig(config)
	config.GroupVersion, config.APIPath = &group, path
	config.ContentType, config.AcceptContentTypes = contentType, contentType+","+runtime.ContentTypeJSON
	return rest.RESTClientForConfigAndClient(config, httpClient)
}

// sliceSelector leaves out what no service IP can lead to: slices that belong to no Service, and those of headless ones.
const sliceSelector = discoveryv1.LabelServiceName + ",!" + corev1.IsHeadlessService

// source is one kind of object that the agent watches.
type source struct {
	resource string
	client   *rest.RESTClient
	// narrow leaves out what the agent does not need.
	narrow  func(*metav1.ListOptions)
	example runtime.Object
	store   cache.ReflectorStore
}

// sources fill the store and the reporter.
func (c *clients) sources(log logr.Logger, nodeName string, s *store, r *reporter) []source {
	own := func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector("metadata.name", nodeName).String()
	}
	withService := func(o *metav1.ListOptions) { o.LabelSelector = sliceSelector }
	all := func(*metav1.ListOptions) {}
	parseSlice := func(in *discoveryv1.EndpointSlice) (*compile.Slice, []compile.Problem) {
		return compile.ParseSlice(in, nodeName)
	}
	return []source{
		{"nodes", c.core, own, &corev1.Node{},
			&reflectorStore[compile.Node]{nodeFeed{s}, parser(log, "Node", compile.ParseNode)}},
		{"endpointslices", c.discovery, withService, &discoveryv1.EndpointSlice{},
			&reflectorStore[compile.Slice]{s.sliceFeed(), parser(log, "EndpointSlice", parseSlice)}},
		{"serviceassignments", c.serviceproxy, all, &v1alpha1.ServiceAssignment{},
			&reflectorStore[compile.Assignment]{s.assignmentFeed(), parser(log, "ServiceAssignment", compile.ParseAssignment)}},
		{"nodeproxystates", c.serviceproxy, own, &v1alpha1.NodeProxyState{},
			&reflectorStore[nodeState]{stateFeed{s, r}, parser(log, "NodeProxyState", parseNodeState)}},
	}
}

// reflector lists and watches a source for as long as it runs; it retries by itself.
func (s source) reflector(log logr.Logger) *cache.Reflector {
	lw := cache.ToListWatcherWithWatchListSemantics(
		cache.NewFilteredListWatchFromClient(s.client, s.resource, metav1.NamespaceAll, s.narrow), s.client)
	log = log.WithName("watch").WithValues("resource", s.resource)
	return cache.NewReflectorWithOptions(lw, s.example, s.store, cache.ReflectorOptions{
		Logger: &log,
		Name:   s.resource,
		// Soon after the API server is back, the agent must be too: client-go's default waits for up to a minute. The jitter
		// spreads the nodes.
		Backoff: &wait.Backoff{Duration: 500 * time.Millisecond, Factor: 2, Jitter: 1, Steps: 8, Cap: 10 * time.Second},
	})
}
