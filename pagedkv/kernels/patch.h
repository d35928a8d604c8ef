// Grid (ceil(size / (WARPS * 32)), 1, 1) groups of WARPS * 32 threads.
//
// Integers that a launch is given become an array of `size`; with BASE a copy of `base` in which they are
// changed: pairs of a place and what is there then, those past the end for nothing. EVERY_GIVEN names all.
const int place = group_x * (WARPS * 32) + thread_id;
if (place < size) {
#if BASE
  int value = base[place];
#else
  int value = 0;
#endif
#define GIVEN(where, what) value = where == place ? what : value;
  EVERY_GIVEN
  outputs[place] = value;
}
