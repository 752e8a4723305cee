package v1alpha1_test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"sigs.k8s.io/yaml"
)

var _ = Describe("the schemas", func() {
	It("describe every field, for kubectl explain", func() {
		var bare []string
		eachField(func(f field) {
			if f.schema.Description == "" && !f.item && f.path != ".metadata" { // the API server describes metadata itself
				bare = append(bare, f.String())
			}
		})
		Expect(bare).To(BeEmpty())
	})

	It("bound every string and list, because CEL's cost is reckoned from the bounds", func() {
		var boundless []string
		eachField(func(f field) {
			s := f.schema
			switch {
			case foreign.MatchString(f.path), f.path == ".apiVersion", f.path == ".kind":
			case s.Type == "string" && s.MaxLength == nil && len(s.Enum) == 0 && s.Format != "date-time",
				s.Type == "array" && s.MaxItems == nil:
				boundless = append(boundless, f.String())
			}
		})
		Expect(boundless).To(BeEmpty())
	})

	It("give every list a type, for server-side apply", func() {
		var untyped []string
		eachField(func(f field) {
			if f.schema.Type == "array" && f.schema.XListType == nil && !foreign.MatchString(f.path) {
				untyped = append(untyped, f.String())
			}
		})
		Expect(untyped).To(BeEmpty())
	})
})

// foreign matches the paths whose schema is apimachinery's: the insides of conditions and label selectors.
var foreign = regexp.MustCompile(`\.conditions\[\*\]|[sS]elector\.match`)

// field is one node of a CRD's schema.
type field struct {
	kind   string
	path   string // from the root, with [*] for items: .spec.serviceRanges[*].cidr
	item   bool   // it is the items of a list or the values of a map
	schema apiextensionsv1.JSONSchemaProps
}

func (f field) String() string { return f.kind + f.path }

// eachField calls visit with every field of every CRD.
func eachField(visit func(field)) {
	GinkgoHelper()
	for _, crd := range crds() {
		for _, version := range crd.Spec.Versions {
			walk(field{kind: crd.Spec.Names.Kind, schema: *version.Schema.OpenAPIV3Schema}, visit)
		}
	}
}

func walk(f field, visit func(field)) {
	visit(f)
	for name, schema := range f.schema.Properties {
		walk(field{kind: f.kind, path: f.path + "." + name, schema: schema}, visit)
	}
	if items := f.schema.Items; items != nil {
		walk(field{kind: f.kind, path: f.path + "[*]", item: true, schema: *items.Schema}, visit)
	}
	if values := f.schema.AdditionalProperties; values != nil {
		walk(field{kind: f.kind, path: f.path + "[*]", item: true, schema: *values.Schema}, visit)
	}
}

func crds() []apiextensionsv1.CustomResourceDefinition {
	GinkgoHelper()
	files, err := filepath.Glob(crdFolder + "/*.yaml")
	Expect(err).NotTo(HaveOccurred())
	Expect(files).To(HaveLen(4))
	var out []apiextensionsv1.CustomResourceDefinition
	for _, file := range files {
		text, err := os.ReadFile(file)
		Expect(err).NotTo(HaveOccurred())
		var crd apiextensionsv1.CustomResourceDefinition
		Expect(yaml.UnmarshalStrict(text, &crd)).To(Succeed())
		out = append(out, crd)
	}
	return out
}

// rule is one restriction of a schema, as seen in what the API server says when it is broken.
type rule struct {
	kind, path string
	what       string           // for people
	said       []*regexp.Regexp // one of them matches the message
}

func (r rule) String() string { return fmt.Sprintf("%s%s: %s", r.kind, r.path, r.what) }

// rules lists every restriction of the schemas that is ours.
func rules() []rule {
	GinkgoHelper()
	var out []rule
	eachField(func(f field) {
		if foreign.MatchString(f.path) {
			return
		}
		add := func(path, what string, said ...string) {
			r := rule{kind: f.kind, path: path, what: what}
			for _, s := range said {
				r.said = append(r.said, regexp.MustCompile(s))
			}
			out = append(out, r)
		}
		s := f.schema
		for _, name := range s.Required {
			add(f.path+"."+name, "required", "^Required value")
		}
		bounds := []struct {
			set        bool
			what, said string
		}{
			{len(s.Enum) > 0, "enum", "^Unsupported value"},
			{s.Minimum != nil, "minimum", "should be greater than or equal to"},
			{s.Maximum != nil, "maximum", "should be less than or equal to"},
			{s.MinLength != nil, "minLength", "should be at least [0-9]+ chars long"},
			{s.MaxLength != nil, "maxLength", "^Too long"},
			{s.MinItems != nil, "minItems", "should have at least"},
			{s.MaxItems != nil, "maxItems", "^Too many"},
		}
		for _, b := range bounds {
			if b.set {
				add(f.path, b.what, b.said)
			}
		}
		if s.XListType != nil && *s.XListType != "atomic" {
			add(f.path+"[*]", "unique items", "^Duplicate value")
		}
		for _, v := range s.XValidations {
			add(f.path+v.FieldPath, v.Rule, messages(v)...)
		}
		Expect(s.Pattern).To(BeEmpty(), "%s has a pattern, whose message helps nobody: say it in CEL with a message", f)
	})
	slices.SortFunc(out, func(a, b rule) int { return strings.Compare(a.String(), b.String()) })
	return out
}

var celLiteral = regexp.MustCompile(`'([^']*)'`)

// messages gives what a CEL rule may say, as regular expressions: its message or the formats and sentences in its messageExpression.
func messages(v apiextensionsv1.ValidationRule) []string {
	if v.MessageExpression == "" {
		return []string{regexp.QuoteMeta(v.Message)}
	}
	var out []string
	for _, m := range celLiteral.FindAllStringSubmatch(v.MessageExpression, -1) {
		if strings.Contains(m[1], " ") { // a sentence, not a name
			out = append(out, regexp.MustCompile(`%[sd]`).ReplaceAllLiteralString(regexp.QuoteMeta(m[1]), ".*"))
		}
	}
	return out
}
