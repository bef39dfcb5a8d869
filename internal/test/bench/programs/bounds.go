package programs

// Bound is how many nanoseconds more a program may take than another one.
type Bound struct {
	Operation string
	// Base is what it is compared with: an empty program, or the same program in another
	// operation.
	Base   string
	AtMost float64
}

// Bounds returns the bounds.
func Bounds() []Bound {
	return []Bound{
		{Pass, EmptyProgram, 4},
		{"pass tcp4 1500 B", EmptyProgram, 4},
		{"pass udp4 64 B", EmptyProgram, 4},
		{"pass tcp6 64 B", EmptyProgram, 4},
		{"pass tcp6 1500 B", EmptyProgram, 4},
		{"pass udp6 64 B", EmptyProgram, 4},
		{"tcp4, 20,000 blocked prefixes", Pass, 1},
		{"tcp6, 20,000 blocked prefixes", "pass tcp6 64 B", 1},
		{"tcp4, 10,000 containers", Pass, 1},
		{"tcp4 of a service, root policed", Pass, 2},
		{"tcp6 of a service, root policed", "pass tcp6 64 B", 2},
		{"tcp4 of a container, root policed", Pass, 2},
		{"syn4 to another port", EmptyProgram, 5},
		{"syn6 to another port", EmptyProgram, 5},
		{"refused mail syn4", EmptyProgram, 60},
		{"refused mail syn6", EmptyProgram, 60},
		{"refused mail syn4, 10,000 containers", EmptyProgram, 60},
	}
}
