package allocator

import (
	"math/rand/v2"
	"testing"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// replica is a Space of its own, with a policy whose ports are the lower half of what the API server gives out.
func replica(seed uint64) *Space {
	s := NewSpace(rand.New(rand.NewPCG(seed, 0)))
	s.Configure([]*Policy{{Name: "p", NodePorts: PortRange{30000, 31999}}}, Server{NodePorts: PortRange{30000, 33999}})
	return s
}

// picks draws n times, each time from what is free to begin with.
func picks(t *testing.T, s *Space, n int, odd bool) map[Lock]int {
	t.Helper()
	out := map[Lock]int{}
	for range n {
		g, err := s.Grant(Request{Use: v1alpha1.ClaimUseNodePort, Odd: odd})
		if err != nil {
			t.Fatal(err)
		}
		s.SetTaken(g.Lock, false)
		out[g.Lock]++
	}
	return out
}

func TestWhatFollowsAnExcludedStretchIsNoLikelier(t *testing.T) {
	const n = 10000
	for lock, times := range picks(t, replica(1), n, true) {
		if times > n/100 { // 10 is what to expect of one of 1000
			t.Errorf("%s was picked %d of %d times", lock, times, n)
		}
	}
}

func TestTwoReplicasThatSteerDoNotMeet(t *testing.T) {
	odd, even := picks(t, replica(1), 5000, true), picks(t, replica(2), 5000, false)
	for lock := range odd {
		if even[lock] > 0 {
			t.Errorf("both picked %s", lock)
		}
	}
}

func TestAHalfThatIsFullIsNotTheEnd(t *testing.T) {
	s := replica(1)
	seen := map[Lock]bool{}
	for range 2000 {
		g, err := s.Grant(Request{Use: v1alpha1.ClaimUseNodePort})
		if err != nil {
			t.Fatalf("after %d: %v", len(seen), err)
		}
		seen[g.Lock] = true
	}
	if len(seen) != 2000 {
		t.Errorf("%d different ports, want 2000", len(seen))
	}
}
