// All of the machine that no kernel's source is compiled with: once, for every library.
#include "api.cc"
#include "barriers.cc"
#include "grid.cc"
#include "mbarrier.cc"
#include "report.cc"
#include "tma.cc"
#include "wgmma.cc"
