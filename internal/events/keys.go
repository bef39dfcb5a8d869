package events

import (
	"encoding"
	"reflect"
	"strings"
)

// Keys returns the keys of records, in the order of their JSON: those of objects, such as
// container, and those inside of them, such as container.name.
func Keys() []string { return keysOf(reflect.TypeFor[Record](), "") }

func keysOf(t reflect.Type, prefix string) (keys []string) {
	for i := range t.NumField() {
		f := t.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		keys = append(keys, prefix+name)
		inner := f.Type
		if inner.Kind() == reflect.Pointer {
			inner = inner.Elem()
		}
		if inner.Kind() == reflect.Struct && !inner.Implements(reflect.TypeFor[encoding.TextMarshaler]()) {
			keys = append(keys, keysOf(inner, prefix+name+".")...)
		}
	}
	return keys
}
