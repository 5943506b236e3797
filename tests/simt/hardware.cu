// The cases of cases.cuh on a GPU: without an argument the correct ones, with the name of a planted bug that one alone.
#include <cstdio>
#include <exception>
#include <string>

#include "cases.cuh"

namespace {

bool run(const cases::Case& one) {
  try {
    one.run();
  } catch (const std::exception& error) {
    std::printf("WRONG %s: %s\n", one.name, error.what());
    return false;
  }
  std::printf("ok %s\n", one.name);
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  bool right = true;
  if (count == 1) {
    for (const cases::Case& one : cases::kCorrect) right = run(one) && right;
    return right ? 0 : 1;
  }
  for (const cases::Case& one : cases::kPlanted) {
    if (std::string(arguments[1]) == one.name) return run(one) ? 0 : 1;
  }
  std::fprintf(stderr, "no planted bug named %s\n", arguments[1]);
  return 2;
}
