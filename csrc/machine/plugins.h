// plugins.h - back ends of the engine in files of their own, if the library was built with PYLLAVA_PLUGINS.
#pragma once

#include "error.h"

// See pyllava_plugin_load.
pyllava_status plugin_load(const char * const * paths, int32_t n);
