package enforcement

import (
	"slices"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func nowish() *metav1.Time { return &metav1.Time{Time: time.Now()} }

// addressesOf lists the IPAddresses of Services of a namespace.
func addressesOf(namespace string) []networkingv1.IPAddress {
	GinkgoHelper()
	var list networkingv1.IPAddressList
	Expect(k8s.List(ctx, &list)).To(Succeed())
	return slices.DeleteFunc(list.Items, func(ip networkingv1.IPAddress) bool { return ip.Spec.ParentRef.Namespace != namespace })
}
