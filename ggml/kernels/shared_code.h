// shared_code.h - code that is compiled once per instruction set but written for none: included by
// shared_<set>.c, which names the set.
#include "attention.c"
#include "fast_attention.c"
#include "gelu.c"
#include "linear.c"
#include "rope.c"
