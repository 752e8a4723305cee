package v1alpha1

import (
	"bufio"
	"bytes"
	gojson "encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation/field"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/json"
	"sigs.k8s.io/yaml"
)

// Decode reads a file, YAML or JSON, of the given kind into the configuration that into points to. It fills in no defaults and looks at no values but for their types. What the
// file does not say stays as it was. The error has all that is wrong, a problem per line.
func Decode(file []byte, kind string, into any) error {
	if err := oneDocument(file); err != nil {
		return err
	}
	text, err := yaml.YAMLToJSON(file)
	if err != nil {
		return fmt.Errorf("is no YAML: %w", err)
	}
	var problems []error
	if _, err := yaml.YAMLToJSONStrict(file); err != nil {
		// All that the strict reading minds beyond the other are keys that are there twice.
		problems = append(problems, fmt.Errorf("a field is given twice: %w", err))
	}
	var generic any
	if err := json.UnmarshalCaseSensitivePreserveInts(text, &generic); err != nil {
		return err
	}
	content, ok := generic.(map[string]any)
	if !ok {
		return fmt.Errorf("must hold the fields of one object, beginning with apiVersion: %s and kind: %s", GroupVersion, kind)
	}
	if wrong := checkType(content, kind); len(wrong) > 0 {
		return wrong.ToAggregate()
	}
	unknown, err := json.UnmarshalStrict(text, into, json.DisallowUnknownFields)
	for _, u := range unknown {
		var named json.FieldError
		if errors.As(u, &named) {
			u = unknownField(named.FieldPath(), Fields(into))
		}
		problems = append(problems, u)
	}
	if err != nil {
		problems = append(problems, wrongType(err, content))
	}
	return errors.Join(problems...)
}

// oneDocument fails if the file has more than one YAML document: all but the first would be passed over without a word.
func oneDocument(file []byte) error {
	documents := utilyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(file)))
	n := 0
	for {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return fmt.Errorf("is no YAML: %w", err)
		}
		var content any
		if err := yaml.Unmarshal(document, &content); err == nil && content == nil {
			continue // comments only
		}
		n++
	}
	if n > 1 {
		return fmt.Errorf("has %d YAML documents: must be one", n)
	}
	return nil
}

// checkType tells whether the file is of this API and kind.
func checkType(content map[string]any, kind string) (wrong field.ErrorList) {
	for name, valid := range map[string]string{"apiVersion": GroupVersion.String(), "kind": kind} {
		switch value, found := content[name]; {
		case !found:
			wrong = append(wrong, field.Required(field.NewPath(name), "must be "+valid))
		case value != valid:
			wrong = append(wrong, field.NotSupported(field.NewPath(name), value, []string{valid}))
		}
	}
	slices.SortFunc(wrong, func(a, b *field.Error) int { return strings.Compare(a.Field, b.Field) })
	return wrong
}

// unknownField says what may have been meant.
func unknownField(path string, known []Field) error {
	parent, name := splitPath(path)
	best, least := "", len(name)/3+2
	var siblings []string
	for _, candidate := range withParents(known) {
		p, n := splitPath(candidate)
		d := distance(strings.ToLower(n), strings.ToLower(name))
		if p == parent {
			siblings = append(siblings, n)
		} else {
			d++ // the same place is likelier
		}
		if d < least {
			best, least = candidate, d
		}
	}
	if best != "" {
		return fmt.Errorf("%s: Unknown field, did you mean %s?", path, best)
	}
	slices.Sort(siblings)
	where := "valid here"
	if parent != "" {
		where = "valid in " + parent
	}
	return fmt.Errorf("%s: Unknown field, %s: %s", path, where, strings.Join(siblings, ", "))
}

// withParents gives the paths of fields and of those that they are in.
func withParents(known []Field) (paths []string) {
	for _, f := range known {
		for path := f.Path; path != ""; path, _ = splitPath(path) {
			if !slices.Contains(paths, path) {
				paths = append(paths, path)
			}
		}
	}
	return paths
}

func splitPath(path string) (parent, name string) {
	i := strings.LastIndexByte(path, '.')
	return path[:max(i, 0)], path[i+1:]
}

// distance is how many characters must be inserted, deleted or replaced to make a of b.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			replaced := diagonal
			if a[i] != b[j] {
				replaced++
			}
			diagonal = row[j+1]
			row[j+1] = min(replaced, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// wrongType names the field, the value and what would be valid, if the error is that a value is of the wrong type.
func wrongType(err error, content map[string]any) error {
	var wrong *gojson.UnmarshalTypeError
	if !errors.As(err, &wrong) || wrong.Field == "" {
		return err
	}
	var value any = content
	for name := range strings.SplitSeq(wrong.Field, ".") {
		if inside, ok := value.(map[string]any); ok {
			value = inside[name]
		}
	}
	return field.Invalid(field.NewPath(wrong.Field), value, validFor(wrong.Type))
}

func validFor(t reflect.Type) string {
	if t == reflect.TypeFor[Duration]() {
		return "must be a duration such as 90s, 10m or 24h"
	}
	switch t.Kind() {
	case reflect.Bool:
		return "must be true or false"
	case reflect.Int32:
		return "must be a whole number of at most 2147483647"
	case reflect.Slice:
		return "must be a list"
	case reflect.Struct:
		return "must hold fields"
	case reflect.String:
		return "must be a string"
	}
	return "must be of another type: " + t.String()
}
