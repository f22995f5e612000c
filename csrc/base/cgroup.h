// cgroup.h - what the control groups of Linux leave this process: of both versions, from the group that it is
// in up to the root, since a group may be wider than those it lies in. Elsewhere there are none.
#pragma once

#include <stdint.h>

// root: a folder in which proc/ and sys/ are looked for; "" for the machine itself.
int32_t cgroup_cpus(const char * root); // whole CPUs' worth of time, at least 1; INT32_MAX: no limit
uint64_t cgroup_memory_available(const char * root); // bytes; UINT64_MAX: no limit
