#include <stdio.h>

#include "words.h"

int main(void) { return puts(words()) < 0; }
