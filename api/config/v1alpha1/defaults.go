package v1alpha1

import (
	"cmp"
	"time"
)

// SetDefaults fills in what is not set.
func (c *AgentConfiguration) SetDefaults() {
	c.APIVersion, c.Kind = GroupVersion.String(), AgentKind
	c.HealthzBindAddress = cmp.Or(c.HealthzBindAddress, ":10256")
	c.MetricsBindAddress = cmp.Or(c.MetricsBindAddress, "127.0.0.1:10249")
	c.DetectLocalMode = cmp.Or(c.DetectLocalMode, LocalModeClusterCIDR)
	if c.ClusterCIDR == nil {
		c.ClusterCIDR = []string{}
	}
	c.Conntrack.setDefaults()
	if c.DropInvalid == nil {
		// As kube-proxy in mode iptables: with liberal tracking, packets outside of the window are valid and reach the client translated.
		c.DropInvalid = new(!c.Conntrack.TCPBeLiberal)
	}
	c.Logging.setDefaults()
}

// kube-proxy's defaults.
func (c *Conntrack) setDefaults() {
	if c.MaxPerCore == nil {
		c.MaxPerCore = new(int32(32 * 1024))
	}
	if c.Min == nil {
		c.Min = new(int32(128 * 1024))
	}
	if c.TCPEstablishedTimeout == nil {
		c.TCPEstablishedTimeout = &Duration{24 * time.Hour}
	}
	if c.TCPCloseWaitTimeout == nil {
		c.TCPCloseWaitTimeout = &Duration{time.Hour}
	}
}

func (l *Logging) setDefaults() {
	l.Level = cmp.Or(l.Level, LogInfo)
	l.Format = cmp.Or(l.Format, LogText)
}

// SetDefaults fills in what is not set.
func (c *ControllerConfiguration) SetDefaults() {
	c.APIVersion, c.Kind = GroupVersion.String(), ControllerKind
	c.HealthzBindAddress = cmp.Or(c.HealthzBindAddress, ":8081")
	c.MetricsBindAddress = cmp.Or(c.MetricsBindAddress, ":8080")
	c.Webhook.BindAddress = cmp.Or(c.Webhook.BindAddress, ":9443")
	c.KubeProxy.HandBackGracePeriod = cmp.Or(c.KubeProxy.HandBackGracePeriod, Duration{30 * time.Second})
	c.Logging.setDefaults()
}
