#include "words.h"

const char *words(void) { return "hello from a machine of its own"; }
