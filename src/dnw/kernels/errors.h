/* What a function says of arguments that it does not take: a negative number, before anything is read or written. Every
 * function that Python calls looks at its arguments so; _library.py turns the number into an error with its text. */

#include <stdint.h>

#define ERRORS(X) \
  X(NULL_POINTER, "a pointer is null") \
  X(BAD_SIZE, "a size is negative, or does not fit the others") \
  X(OTHER_LAYOUT, "records are laid out in another way") \
  X(UNKNOWN_KIND, "there is no such kernel") \
  X(UNKNOWN_TASK, "a call is of a task that is not there") \
  X(OUT_OF_BOUNDS, "a call reads or writes beyond the memory that it is for") \
  X(UNKNOWN_VECTOR, "this machine has no vectors of so many floats")

#define NUMBER(error, text) error,
#define TEXT(error, text) text,
enum { NO_ERROR, ERRORS(NUMBER) NUM_ERRORS };

#define REFUSE_IF(condition, error) \
  do { \
    if (condition) return -(error); \
  } while (0)

/* The text of what a function returned; a null pointer where that is no error. */
const char *dnw_message(int32_t returned) {
  static const char *const texts[] = {ERRORS(TEXT)};
  return returned < 0 && returned > -NUM_ERRORS ? texts[-returned - 1] : 0;
}

#undef NUMBER
#undef TEXT
