package admission

import (
	corev1 "k8s.io/api/core/v1"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// Prediction is what newPlan says the API server does with a request: 0 stands for "nothing", -N for "any, the same wherever -N stands".
type Prediction struct {
	Families  []corev1.IPFamily
	Addresses []string // those held or named, then "" for each that is taken
	Ports     []int32
	Health    int32
}

// Predict shows newPlan to the suite. Not ok: the API server refuses the request.
func Predict(svc, old *corev1.Service, served []v1alpha1.IPFamily) (out Prediction, ok bool) {
	p, ok := newPlan(svc, old, served, served[0])
	if !ok {
		return out, false
	}
	out.Families, out.Addresses, out.Health = p.service.Spec.IPFamilies, p.service.Spec.ClusterIPs, p.service.Spec.HealthCheckNodePort
	for _, port := range p.service.Spec.Ports {
		out.Ports = append(out.Ports, port.NodePort)
	}
	for i, w := range p.wants {
		switch {
		case w.isNamed():
			if old == nil && w.family == "" && len(w.ports) > 0 { // the API server fills in the others of the number
				for j, port := range p.service.Spec.Ports {
					if port.Port == p.service.Spec.Ports[w.ports[0]].Port && out.Ports[j] == 0 && allocatesNodePorts(svc) {
						out.Ports[j] = int32(w.named.Port)
					}
				}
			}
		case w.family != "":
			out.Addresses = append(out.Addresses, "")
		case w.use == v1alpha1.ClaimUseHealthCheckNodePort:
			out.Health = int32(-1 - i)
		default:
			for _, j := range w.ports {
				out.Ports[j] = int32(-1 - i)
			}
		}
	}
	return out, true
}
