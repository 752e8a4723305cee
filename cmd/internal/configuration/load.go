// Package configuration is what both programs do with their configuration: read it from a file and flags, follow the file, and show what is in force.
package configuration

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation/field"
	"sigs.k8s.io/yaml"

	config "github.com/serviceproxy/serviceproxy-operator/api/config/v1alpha1"
)

// Configuration is a pointer to one of the types of api/config.
type Configuration interface {
	SetDefaults()
	Validate() field.ErrorList
}

// Program says how a program is configured: by its file, then by its flags, which win, then by its environment, then by defaults.
type Program[C Configuration] struct {
	// Name is the program's, Kind its configuration's.
	Name, Kind string
	// New gives an empty configuration.
	New func() C
	// Define defines the flags of the program that set fields of a configuration, with what it has as their defaults, and gives the fields' paths by flag.
	Define func(*flag.FlagSet, C) (fields map[string]string)
	// Environment fills in what neither file nor flag said.
	Environment func(C)
}

// Common is what the flags say that both programs have and that are no part of the configuration.
type Common struct {
	File           string
	Print, Version bool
}

// Parse reads the arguments, and complains to stderr about those that cannot be read. The error is flag.ErrHelp if help was asked for, and given.
func (p Program[C]) Parse(args []string, stderr io.Writer) (Common, error) {
	shown := p.New()
	shown.SetDefaults()
	common, _, err := p.parse(args, shown, stderr)
	return common, err
}

// fieldFlags are the flags of fields by their path, and which of them are given.
type fieldFlags struct {
	of    map[string]string
	given map[string]bool
}

// parse sets what the arguments say in c.
func (p Program[C]) parse(args []string, c C, stderr io.Writer) (common Common, found fieldFlags, err error) {
	flags := flag.NewFlagSet(p.Name, flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&common.File, "config", "", fmt.Sprintf("a file that holds one %s (docs/configuration.md); flags that are given win over it", p.Kind))
	flags.BoolVar(&common.Print, "print-config", false, "print the configuration that file, flags and environment make, and exit")
	flags.BoolVar(&common.Version, "version", false, "print the version and exit")
	fields := p.Define(flags, c)
	if err := flags.Parse(args); err != nil {
		return common, found, err
	}
	if flags.NArg() > 0 {
		return common, found, fmt.Errorf("unexpected argument %q: all settings are flags", flags.Arg(0))
	}
	found = fieldFlags{of: map[string]string{}, given: map[string]bool{}}
	for name, path := range fields {
		found.of[path] = "--" + name
	}
	flags.Visit(func(f *flag.Flag) { found.given[fields[f.Name]] = true })
	return common, found, nil
}

// Load puts the configuration together. file is the content of the file that is called name; both are empty if there is none. The arguments are those that Parse took. The error
// has all that is wrong, a problem per line.
func (p Program[C]) Load(name string, file []byte, args []string) (C, error) {
	c := p.New()
	var problems []error
	if name != "" {
		for _, err := range each(config.Decode(file, p.Kind, c)) {
			problems = append(problems, fmt.Errorf("--config %s: %w", name, err))
		}
	}
	_, flags, err := p.parse(args, c, io.Discard)
	if err != nil {
		return c, err
	}
	p.Environment(c)
	c.SetDefaults()
	for _, wrong := range c.Validate() {
		problems = append(problems, flags.blame(wrong, name))
	}
	return c, errors.Join(problems...)
}

// each takes apart what errors.Join has put together.
func each(err error) []error {
	switch err := err.(type) { //nolint:errorlint // only what was joined last is taken apart
	case nil:
		return nil
	case interface{ Unwrap() []error }:
		return err.Unwrap()
	}
	return []error{err}
}

// blame names the flag or the file that a wrong value comes from, and if it is neither's, the flag that could set it.
func (f fieldFlags) blame(wrong *field.Error, file string) error {
	path, index := wrong.Field, ""
	if i := strings.IndexByte(path, '['); i >= 0 {
		path, index = path[:i], path[i:]
	}
	named := *wrong
	switch name := f.of[path]; {
	case f.given[path]:
		named.Field = name + index
	case file != "":
		return fmt.Errorf("--config %s: %w", file, wrong)
	case name != "":
		named.Field += " (" + name + ")"
	}
	return &named
}

// read reads the file of that name, if there is a name.
func read(name string) ([]byte, error) {
	if name == "" {
		return nil, nil
	}
	content, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("--config %q: must be a file that can be read: %w", name, err)
	}
	return content, nil
}

// Print writes a configuration as a file that would give it.
func Print(to io.Writer, c Configuration) error {
	text, err := yaml.Marshal(c)
	if err != nil {
		return err
	}
	_, err = to.Write(text)
	return err
}

// Address is a flag for a bind address. Empty means nowhere, as 0 does.
type Address struct{ To *string }

// String gives the address.
func (a Address) String() string {
	if a.To == nil {
		return "" // flag asks a zero Address whether it is the default
	}
	return *a.To
}

// Set takes an address.
func (a Address) Set(value string) error {
	if value == "" {
		value = config.Nowhere
	}
	*a.To = value
	return nil
}
