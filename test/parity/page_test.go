package parity

import (
	"fmt"
	"slices"
	"strings"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend/backendtest"
)

// page is all that the page says.
type page struct {
	columns  []column
	results  map[string]map[string]backendtest.Result
	proved   map[proof]bool
	upstream string
}

const introduction = `# Parity

<!-- Written by ` + "`make parity`" + ` from test results. CI fails if it is not what they are. Do not edit. -->

What a Service and a node are owed, and which proxy keeps it: each mode of this project, and kube-proxy of %s for reference.

Each row is a scenario of [agent/backend/backendtest](../agent/backend/backendtest): TCP, UDP and SCTP packets, IPv4 and IPv6, between network namespaces that are a node, its
pods, another node with pods, and a client outside. All proxies run the same table in the same laboratory. For kube-proxy, a real API server holds the Services, EndpointSlices
and Nodes, and it is started again where its configuration has to change. Our modes have one try at a row; kube-proxy has three, because we want to know what
it can do and not how often it loses a race.

✓ kept, ✗ not kept, – does not apply; the number leads to the reason

## Traffic

`

// render writes the page.
func render(p page) string {
	var b strings.Builder
	fmt.Fprintf(&b, introduction, p.upstream)
	head, line := "| |", "|---|"
	for _, c := range p.columns {
		name := c.name
		if !c.reference {
			name = "**serviceproxy " + name + "**"
		}
		head, line = head+" "+name+" |", line+":---:|"
	}
	b.WriteString(head + "\n" + line + "\n")
	numbers := p.number()
	for _, promise := range promises {
		fmt.Fprintf(&b, "| **%s** |%s\n", promise.name, strings.Repeat(" |", len(p.columns)))
		for _, row := range promise.rows {
			b.WriteString("| " + row + " |")
			for _, c := range p.columns {
				b.WriteString(" " + p.cell(c, row, numbers) + " |")
			}
			b.WriteString("\n")
		}
	}
	p.writeReasons(&b, numbers)
	p.writeNode(&b)
	return b.String()
}

func (p page) cell(c column, row string, numbers map[*reason]int) string {
	switch p.results[c.name][row].Outcome {
	case backendtest.Kept:
		return "✓"
	case backendtest.Broken:
		return "✗ " + link(numbers[reasonFor(c.name, row)])
	case backendtest.NotApplicable:
		return "– " + link(numbers[reasonFor(c.name, row)])
	}
	panic(fmt.Sprintf("%s has no result for %q", c.name, row))
}

func link(n int) string { return fmt.Sprintf("[%d](#r%d)", n, n) }

// number numbers the reasons in the order in which the table needs them.
func (p page) number() map[*reason]int {
	out := map[*reason]int{}
	for _, promise := range promises {
		for _, row := range promise.rows {
			for _, c := range p.columns {
				if r := reasonFor(c.name, row); r != nil && out[r] == 0 {
					out[r] = len(out) + 1
				}
			}
		}
	}
	return out
}

func (p page) writeReasons(b *strings.Builder, numbers map[*reason]int) {
	b.WriteString("\n### Where kube-proxy differs, and why\n\n")
	list := make([]*reason, len(numbers))
	for r, n := range numbers {
		list[n-1] = r
	}
	for i, r := range list {
		fmt.Fprintf(b, "%d. <a id=\"r%d\"></a>%s: %s\n", i+1, i+1, strings.Join(r.proxies, ", "), r.why)
	}
}

func (p page) writeNode(b *strings.Builder) {
	b.WriteString("\n## Node\n\nWhat a node is owed beside traffic is the same in all modes. It is proved by these tests, which have run for this page.\n\n| | | proved by |\n|---|:---:|---|\n")
	for _, promise := range nodePromises {
		kept := !slices.ContainsFunc(promise.proofs, func(x proof) bool { return !p.proved[x] })
		mark := "✗"
		if kept {
			mark = "✓"
		}
		var names []string
		for _, x := range promise.proofs {
			names = append(names, fmt.Sprintf("[%s](../%s) `%s`", x.pkg, x.pkg, x.test))
		}
		fmt.Fprintf(b, "| %s | %s | %s |\n", promise.name, mark, strings.Join(names, ", "))
	}
}
