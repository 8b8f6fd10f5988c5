// How a model says that a kernel did what no kernel may.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <string>

namespace emulator {

// Where the kernel's source asks for something: a defaulted argument of every model.
struct Site {
  const char* file;
  int line;
  const char* function;
  constexpr Site(const char* file = __builtin_FILE(), int line = __builtin_LINE(),
                 const char* function = __builtin_FUNCTION())
      : file(file), line(line), function(function) {}
};

__attribute__((format(printf, 1, 2))) inline std::string text(const char* format, ...) {
  char buffer[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(buffer, sizeof(buffer), format, arguments);
  va_end(arguments);
  return buffer;
}

struct Where {
  const char* instruction;
  Site site;
};

// Ends the launch with a message that says who, where and what; defined by the machine.
[[noreturn]] void fail(const Where& where, const std::string& what);

}  // namespace emulator
