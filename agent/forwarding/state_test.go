package forwarding

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"testing"

	"pgregory.net/rapid"
)

func svc(i int, nodePort uint16) *Service {
	return &Service{Key: ServiceKey{Namespace: "ns", Name: fmt.Sprintf("s%d", i), Port: 80, Protocol: TCP}, NodePort: nodePort}
}

// TestStateIsAMap drives a State and a plain map with the same operations: they must agree, and Changes between any two snapshots must turn one into the other.
func TestStateIsAMap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		type snapshot struct {
			state State
			want  map[ServiceKey]*Service
		}
		history := []snapshot{{want: map[ServiceKey]*Service{}}}
		for range rapid.IntRange(0, 200).Draw(t, "operations") {
			last := history[len(history)-1]
			want := maps.Clone(last.want)
			state := last.state
			i := rapid.IntRange(0, 60).Draw(t, "service")
			if rapid.Bool().Draw(t, "remove") {
				k := svc(i, 0).Key
				delete(want, k)
				state = state.Without(k)
			} else {
				s := svc(i, uint16(rapid.IntRange(0, 3).Draw(t, "value")))
				want[s.Key] = s
				state = state.With(s)
			}
			history = append(history, snapshot{state, want})
		}
		for _, h := range history {
			if h.state.Len() != len(h.want) {
				t.Fatalf("Len is %d, want %d", h.state.Len(), len(h.want))
			}
			seen := 0
			for s := range h.state.All() {
				seen++
				if h.want[s.Key] != s {
					t.Fatalf("All gives %v, which is not the newest", s.Key)
				}
			}
			if seen != len(h.want) {
				t.Fatalf("All gives %d services, want %d", seen, len(h.want))
			}
			for k, s := range h.want {
				if h.state.Get(k) != s {
					t.Fatalf("Get(%v) is not the newest", k)
				}
			}
		}
		a := history[rapid.IntRange(0, len(history)-1).Draw(t, "a")]
		b := history[rapid.IntRange(0, len(history)-1).Draw(t, "b")]
		got := maps.Clone(a.want)
		for c := range Changes(a.state, b.state) {
			switch {
			case c.Next == nil:
				delete(got, c.Prev.Key)
			case c.Prev != nil && c.Prev.Equal(c.Next):
				t.Fatalf("%v is reported and did not change", c.Next.Key)
			default:
				got[c.Next.Key] = c.Next
			}
		}
		if !maps.EqualFunc(got, b.want, func(x, y *Service) bool { return x.Equal(y) }) {
			t.Fatalf("a + Changes(a, b) is not b")
		}
	})
}

func TestCollidingHashes(t *testing.T) {
	var n *node
	const h = 42 // one hash for all: the deepest level must hold them side by side
	for i := range 5 {
		n, _ = n.with(h, maxDepth, svc(i, 0))
	}
	n, shrunk := n.without(h, maxDepth, svc(2, 0).Key)
	if !shrunk {
		t.Fatal("a colliding key was not removed")
	}
	left := map[string]bool{}
	n.each(func(s *Service) bool { left[s.Key.Name] = true; return true })
	if len(left) != 4 || left["s2"] {
		t.Fatalf("left: %v", left)
	}
}

// The cost of a change must not grow with the number of services.
func BenchmarkStateChange(b *testing.B) {
	for _, size := range []int{1000, 10000, 50000} {
		b.Run(fmt.Sprintf("services=%d", size), func(b *testing.B) {
			var s State
			for i := range size {
				s = s.With(svc(i, 0))
			}
			b.ReportAllocs()
			for b.Loop() {
				next := s.With(svc(rand.IntN(size), uint16(1+rand.IntN(60000))))
				n := 0
				for range Changes(s, next) {
					n++
				}
				if n > 1 {
					b.Fatalf("%d changes", n)
				}
				s = next
			}
		})
	}
}
