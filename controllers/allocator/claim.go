package allocator

import (
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// NewClaim makes the claim that takes the lock when it is created.
func NewClaim(lock Lock, hold Hold) *v1alpha1.AllocationClaim {
	c := &v1alpha1.AllocationClaim{ObjectMeta: metav1.ObjectMeta{Name: lock.Name()}}
	if lock.IsPort() {
		c.Spec.NodePort = int32(lock.Port)
	} else {
		c.Spec.Address = lock.Addr.String()
	}
	SetHold(c, hold)
	return c
}

// HoldOf is what the claim says about its lock.
func HoldOf(c *v1alpha1.AllocationClaim) Hold {
	return Hold{Policy: c.Spec.PolicyName, Use: c.Spec.Use, State: c.Spec.State,
		Holder: Holder{Namespace: c.Spec.Holder.Namespace, Name: c.Spec.Holder.Name, UID: string(c.Spec.Holder.UID)}}
}

// SetHold makes the claim say what hold, which is not Released, says. The reservation token of whoever held it before goes.
func SetHold(c *v1alpha1.AllocationClaim, hold Hold) {
	if c.Labels == nil {
		c.Labels = map[string]string{}
	}
	c.Labels[v1alpha1.LabelManagedBy], c.Labels[v1alpha1.LabelPolicy] = v1alpha1.ManagedBy, hold.Policy
	c.Spec.Use, c.Spec.PolicyName, c.Spec.State = hold.Use, hold.Policy, hold.State
	c.Spec.Holder = v1alpha1.ClaimHolder{Namespace: hold.Holder.Namespace, Name: hold.Holder.Name, UID: types.UID(hold.Holder.UID)}
	c.Spec.ReservationToken, c.Spec.ExpiresAt = "", nil
}

// Release makes the claim rest until a moment. Its holder stays, as the one that held it last.
func Release(c *v1alpha1.AllocationClaim, until time.Time) {
	c.Spec.State, c.Spec.ReservationToken = v1alpha1.ClaimReleased, ""
	// Stored with a resolution of a second: round up, or a short rest is none.
	c.Spec.ExpiresAt = &metav1.Time{Time: until.Add(time.Second - 1).Truncate(time.Second)}
}
