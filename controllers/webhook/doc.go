// Package webhook runs the admission webhook for Services, whose logic is elsewhere: it makes and renews the certificate it is served with, tells the API
// servers of it with a MutatingWebhookConfiguration, and says when this process is ready to serve.
//
// The certificate is in a Secret that any replica may write, guarded by optimistic locking; all serve the newest that they have seen. The configuration
// is the leader's. The two depend on one another during a rotation: a new authority signs only after every API server has had time to trust it, so
// the leader records in the Secret since when the configuration has held its bundle.
package webhook
