// Kernels after fork(). GNU's OpenMP keeps the pool of the thread that forks, whose threads are not
// there in the child: a child's first parallel region would wait for them for ever (torch's own
// kernels do). So the pool is dissolved before a fork, and parent and child make new ones when they
// need them; where it cannot be, as inside a parallel region, the child's kernels run on one
// thread.
#pragma once

namespace sk {

// Set in a child that cannot start threads.
inline bool one_thread = false;

}  // namespace sk
