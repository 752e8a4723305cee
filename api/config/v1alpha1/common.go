package v1alpha1

import (
	"encoding/json"
	"reflect"
	"time"
)

// Nowhere is the bind address that means: do not listen.
const Nowhere = "0"

// ClientConnection says how to reach the API server.
type ClientConnection struct {
	// kubeconfig is the path of a kubeconfig file. Default: the one that the environment variable KUBECONFIG names, else the Pod's service account.
	Kubeconfig string `json:"kubeconfig"`
}

// LogLevel says how much is logged.
type LogLevel string

// Log levels.
const (
	LogInfo  LogLevel = "info"
	LogDebug LogLevel = "debug"
)

// LogFormat says how log lines are written.
type LogFormat string

// Log formats.
const (
	LogText LogFormat = "text"
	LogJSON LogFormat = "json"
)

// Logging says what is logged, to standard error.
type Logging struct {
	// level is info, or debug for more. Default: info.
	Level LogLevel `json:"level" apply:"live"`
	// format is text (key=value) or json (an object per line). Default: text.
	Format LogFormat `json:"format"`
}

// Duration is a time.Duration, written as in metav1.Duration, whose errors tell which field they are about.
type Duration struct {
	time.Duration
}

// MarshalJSON writes a string such as "1h30m0s".
func (d Duration) MarshalJSON() ([]byte, error) { return json.Marshal(d.String()) }

// UnmarshalJSON reads a string such as "90s" or "1h30m".
func (d *Duration) UnmarshalJSON(data []byte) error {
	var text string
	err := json.Unmarshal(data, &text)
	if err == nil {
		d.Duration, err = time.ParseDuration(text)
	}
	if err != nil {
		return &json.UnmarshalTypeError{Value: string(data), Type: reflect.TypeFor[Duration]()} // the decoder adds the field's name to an error of this type only
	}
	return nil
}
