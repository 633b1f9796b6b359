// The one file that includes liburing's header. HAVE_URING tells whether it was there at build time.
#pragma once

#ifdef DUALKV_HAVE_URING
#include <liburing.h>
#endif
