// shared_code.h - all that is compiled once per instruction set without being written for one: included by
// shared_<set>.c, which names the set.
#include "attention.c"
#include "fast_attention.c"
#include "linear.c"
#include "rope.c"
