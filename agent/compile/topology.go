package compile

// choose gives the endpoints of one family that serve traffic which may go anywhere, and those that serve traffic bound to this
// node. Each falls back by itself from ready endpoints to those that terminate but still serve; everywhere is empty only if there
// is neither kind in the whole cluster.
func choose(list []candidate, zone string) (everywhere, here []candidate) {
	prefer := preference(list, zone)
	everywhere = filter(list, func(c candidate) bool { return c.Flags.Has(Ready) && prefer(c) })
	if len(everywhere) == 0 {
		// A preference always leaves a ready endpoint, so there is none at all.
		everywhere = filter(list, draining)
	}
	here = filter(list, func(c candidate) bool { return c.Flags.Has(Ready | Local) })
	if len(here) == 0 {
		here = filter(list, func(c candidate) bool { return c.Flags.Has(Local) && draining(c) })
	}
	return everywhere, here
}

// draining says that an endpoint is on its way out and still answers.
func draining(c candidate) bool { return !c.Flags.Has(Ready) && c.Flags.Has(Serving|Terminating) }

// preference gives which ready endpoints this node should use by their hints, which is how the control plane carries out a
// Service's trafficDistribution and topology mode: those hinted for this node, else those hinted for its zone, else all. A kind of
// hint counts only if every ready endpoint has it (else the hints are being rolled out, and following them would overload the few)
// and at least one names this node or its zone.
func preference(list []candidate, zone string) func(candidate) bool {
	byNode, byZone := true, true
	hasNode, hasZone := false, false
	for _, c := range list {
		if !c.Flags.Has(Ready) {
			continue
		}
		byNode = byNode && c.Flags.Has(NodeHinted)
		hasNode = hasNode || c.Flags.Has(HintedHere)
		byZone = byZone && c.ZoneHints != ""
		hasZone = hasZone || c.hintedFor(zone)
	}
	switch {
	case byNode && hasNode:
		return func(c candidate) bool { return c.Flags.Has(HintedHere) }
	case byZone && hasZone:
		return func(c candidate) bool { return c.hintedFor(zone) }
	}
	return func(candidate) bool { return true }
}

// filter gives those of a list that match; the list itself if all do.
func filter[T any](list []T, match func(T) bool) []T {
	n := 0
	for _, c := range list {
		if match(c) {
			n++
		}
	}
	if n == len(list) {
		return list
	}
	out := make([]T, 0, n)
	for _, c := range list {
		if match(c) {
			out = append(out, c)
		}
	}
	return out
}
