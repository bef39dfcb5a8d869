package cgroup

// NetV1In is NetV1 for a given /proc/self/mountinfo.
var NetV1In = netV1

// DelegatesIn is Root.Delegates for a given /proc/self/mountinfo.
var DelegatesIn = delegates

// ContainerIn is ContainerOf for a given /proc/PID/cgroup.
var ContainerIn = containerIn
