// Runs the threads of a block as fibers, from barrier to barrier.
//
// One launch at a time, from one thread of the host (the caller holds the
// lock of the interpreter).  Nothing here allocates while fibers run.

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>

struct uint3 {
  unsigned int x, y, z;
};

enum { kDynamicSize = 256 * 1024, kDynamicGuard = 4096 };

extern "C" {
uint3 threadIdx, blockIdx, blockDim, gridDim;
alignas(1024) char coh_dynamic_shared[kDynamicSize + kDynamicGuard];
}

namespace {

enum Schedule { kAscending, kDescending, kRandom };
enum State { kUnstarted, kReady, kBarrier, kWarp, kDone };
enum WarpKind { kSyncwarp, kIndex, kUp, kDown, kXor, kBallot, kAny, kAll };

const char* const kBarrierNames[] = {
    "__syncthreads()", "__syncthreads_or()", "__syncthreads_and()",
    "__syncthreads_count()"};
const char* const kWarpNames[] = {
    "__syncwarp()", "__shfl_sync()", "__shfl_up_sync()",
    "__shfl_down_sync()", "__shfl_xor_sync()", "__ballot_sync()",
    "__any_sync()", "__all_sync()"};

const int kMaxThreads = 1024;
const size_t kPage = 16384;  // no page is larger where this runs
const size_t kStack = 128 * 1024;

struct Thread {
  void* sp;
  int state, kind, stack, argument, width, lane;
  unsigned int mask;
  uint64_t value, result;
  uint3 index;
};

typedef void (*Thunk)(void**);

Thread threads[kMaxThreads];
Thread* current;
int n_threads, n_warps;
char* stacks;
int free_stacks[kMaxThreads], n_free, n_made;
void* main_sp;
Thunk thunk;
void** arguments;
int kind_of_schedule;
uint64_t random_state;
sigjmp_buf main_env;
volatile bool running;
pthread_t runner;
char* message;
size_t message_size;

[[noreturn]] void vfail(const char* format, va_list list) {
  size_t n = 0;
  if (current) {
    const uint3 t = current->index, b = blockIdx;
    n = snprintf(message, message_size, "thread (%u, %u, %u) of block "
                 "(%u, %u, %u): ", t.x, t.y, t.z, b.x, b.y, b.z);
  }
  vsnprintf(message + n, message_size - n, format, list);
  siglongjmp(main_env, 1);
}

[[noreturn]] void fail(const char* format, ...) {
  va_list list;
  va_start(list, format);
  vfail(format, list);
}

uint64_t draw() {
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return (random_state * 2685821657736338717ull) >> 32;
}

template <typename T>
void arrange(T* order, T n) {
  for (T i = 0; i < n; ++i) {
    order[i] = kind_of_schedule == kDescending ? n - 1 - i : i;
  }
  if (kind_of_schedule == kRandom) {
    for (T i = n; i > 1; --i) {
      T j = static_cast<T>((draw() * static_cast<uint64_t>(i)) >> 32);
      T t = order[i - 1];
      order[i - 1] = order[j];
      order[j] = t;
    }
  }
}

// --------------------------------------------------------------- fibers

extern "C" void coh_switch(void** save, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.globl coh_switch
.hidden coh_switch
.type coh_switch, @function
coh_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size coh_switch, . - coh_switch
)");

void* prepare(char* top, void (*entry)()) {
  void** sp = reinterpret_cast<void**>(top);
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  return sp;
}
#elif defined(__aarch64__)
asm(R"(
.text
.globl coh_switch
.hidden coh_switch
.type coh_switch, %function
coh_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size coh_switch, . - coh_switch
)");

void* prepare(char* top, void (*entry)()) {
  void** sp = reinterpret_cast<void**>(top) - 20;
  for (int i = 0; i < 20; ++i) sp[i] = nullptr;
  sp[11] = reinterpret_cast<void*>(entry);
  return sp;
}
#else
#error "the switch between fibers is written for x86-64 and aarch64 only"
#endif

void body() {
  thunk(arguments);
  current->state = kDone;
  void* dead;
  coh_switch(&dead, main_sp);
  __builtin_unreachable();
}

// Leaves pages for the stacks: they are backed when they are used.
bool make_pool() {
  if (stacks) return true;
  void* p = mmap(nullptr, kStack * kMaxThreads, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return false;
  stacks = static_cast<char*>(p);
  return true;
}

// ---------------------------------------------------------------- races

// What has been done to a byte.  An interval is what lies between two
// barriers of a block; an epoch of a warp is what lies between two
// __syncwarp() of it.  A shuffle orders no memory.
struct Access {
  uint32_t interval, epoch, block, fence;
  int16_t thread, warp;  // kMany where there are several
  bool atomic;
};
struct Cell {
  uintptr_t key;
  Access read, write;
};

const int16_t kMany = -1;
const uint32_t kManyBlocks = ~0u;
Cell* cells;
size_t n_cells, n_used;
uint32_t interval_number, block_number, epochs[kMaxThreads / 32];

Cell* find_cell(uintptr_t key) {
  size_t i = (key * 0x9e3779b97f4a7c15ull) >> 20;
  for (;; ++i) {
    Cell* c = cells + (i & (n_cells - 1));
    if (c->key == key || !c->key) return c;
  }
}

Cell* cell_of(uintptr_t key) {
  if (2 * n_used >= n_cells) {
    Cell* old = cells;
    const size_t n = n_cells;
    n_cells = n ? 2 * n : 1 << 16;
    cells = static_cast<Cell*>(calloc(n_cells, sizeof(Cell)));
    if (!cells) {
      cells = old;
      n_cells = n;
      fail("no memory for what is known of each byte");
    }
    for (size_t i = 0; i < n; ++i) {
      if (old[i].key) *find_cell(old[i].key) = old[i];
    }
    free(old);
  }
  Cell* c = find_cell(key);
  if (!c->key) {
    c->key = key;
    ++n_used;
  }
  return c;
}

// An atomic operation behind a __threadfence() shows what the block has done
// before the fence to whoever does one on the same place later.  A fence of
// any of its threads is taken for one of all, so not all that is missing is
// found.
struct Atomic {
  uintptr_t place;
  uint32_t block, interval, fence;  // fence: the last one of the block
  int16_t thread;
};
Atomic* atomics;
size_t n_atomics, room_for_atomics;
uint32_t n_fences, last_fence;

void forget_accesses() {
  if (n_used) memset(cells, 0, n_cells * sizeof(Cell));
  n_used = n_atomics = 0;
  interval_number = block_number = n_fences = last_fence = 0;
  memset(epochs, 0, sizeof(epochs));
}

char* arena;
size_t arena_size;

bool is_before(const Access& a, int thread, int warp) {
  return a.interval != interval_number || a.thread == thread ||
         (a.warp == warp && a.epoch < epochs[warp]);
}

// Does the current thread come after what another block has done?
bool is_shown(const Access& a, int thread) {
  for (size_t i = 0; i < n_atomics; ++i) {
    const Atomic& mine = atomics[i];
    if (mine.block != block_number ||
        (mine.interval == interval_number && mine.thread != thread)) {
      continue;
    }
    for (size_t j = 0; j < i; ++j) {
      const Atomic& theirs = atomics[j];
      if (theirs.block == a.block && theirs.place == mine.place &&
          a.fence < theirs.fence &&
          (a.interval < theirs.interval || a.thread == theirs.thread)) {
        return true;
      }
    }
  }
  return false;
}

void remember_atomic(uintptr_t place, int thread) {
  if (n_atomics == room_for_atomics) {
    const size_t n = n_atomics ? 2 * n_atomics : 1024;
    void* p = realloc(atomics, n * sizeof(Atomic));
    if (!p) fail("no memory for what is known of atomics");
    atomics = static_cast<Atomic*>(p);
    room_for_atomics = n;
  }
  atomics[n_atomics++] = {place, block_number, interval_number, last_fence,
                          static_cast<int16_t>(thread)};
}

// Was it done by another block, at any time?
bool is_apart(const Access& a, int thread) {
  return a.interval && a.block != block_number &&
         (a.block == kManyBlocks || !is_shown(a, thread));
}

void describe_place(uintptr_t address, char* text, size_t size);
bool is_of_an_argument(uintptr_t address, size_t size);

void access(uintptr_t address, size_t size, bool write, bool atomic) {
  if (!running || !current) return;
  const uintptr_t pool = reinterpret_cast<uintptr_t>(stacks);
  if (address - pool < kStack * kMaxThreads) return;  // its own
  const int thread = static_cast<int>(current - threads), warp = thread / 32;
  const bool global = address - reinterpret_cast<uintptr_t>(arena) < arena_size;
  if (global && !is_of_an_argument(address, size)) {
    fail("it %s memory of no argument", write ? "writes" : "reads");
  }
  if (atomic) remember_atomic(address, thread);
  for (uintptr_t p = address; p < address + size; ++p) {
    Cell* c = cell_of(p);
    const char* other = nullptr;
    const char* where = "with no barrier between";
    if (atomic && c->write.atomic) {
      // in whichever order
    } else if (!is_before(c->write, thread, warp)) {
      other = "written";
    } else if (global && is_apart(c->write, thread)) {
      other = "written";
      where = "in another block";
    }
    if (!other && write) {
      if (!is_before(c->read, thread, warp)) {
        other = "read";
      } else if (global && is_apart(c->read, thread)) {
        other = "read";
        where = "in another block";
      }
    }
    if (other) {
      const int by = *other == 'r' ? c->read.thread : c->write.thread;
      char who[32], place[128];
      snprintf(who, sizeof(who),
               by == kMany ? "several have" : "thread %d has", by);
      describe_place(p, place, sizeof(place));
      fail("race: it %s %s, which %s %s, %s",
           write ? "writes" : "reads", place, who, other, where);
    }
    Access* a = write ? &c->write : &c->read;
    int16_t t = static_cast<int16_t>(thread), w = static_cast<int16_t>(warp);
    if (!write && !is_before(*a, thread, warp)) {
      // Readers before this one are before whoever comes after it.
      if (a->thread != t) t = kMany;
      if (a->warp != w) w = kMany;
    }
    a->block = !write && a->interval && a->block != block_number
                   ? kManyBlocks : block_number;
    a->interval = interval_number;
    a->epoch = epochs[warp];
    a->fence = n_fences;
    a->thread = t;
    a->warp = w;
    a->atomic = atomic;
  }
}

int take_stack() {
  if (n_free) return free_stacks[--n_free];
  mprotect(stacks + kStack * n_made, kPage, PROT_NONE);
  return n_made++;
}

inline void resume(Thread* t) {
  if (t->state == kUnstarted) {
    t->stack = take_stack();
    // The tops differ in their low bits, or they would all fall into the
    // same few sets of the caches.
    char* top = stacks + kStack * (t->stack + 1) - (t->stack * 320) % 12800;
    t->sp = prepare(top, body);
  }
  t->state = kReady;
  current = t;
  threadIdx = t->index;
  coh_switch(&main_sp, t->sp);
  current = nullptr;
  if (t->state == kDone) free_stacks[n_free++] = t->stack;
}

inline bool can_run(const Thread* t) {
  return t->state == kReady || t->state == kUnstarted;
}

void wait_here(int state, int kind) {
  Thread* t = current;
  t->state = state;
  t->kind = kind;
  coh_switch(&t->sp, main_sp);
}

// ---------------------------------------------------------------- warps

uint64_t shuffled(const Thread* first, int n, const Thread* t) {
  const int lane = t->lane, segment = ~(t->width - 1) & 31;
  const int last = (lane & segment) | (31 & ~segment);
  int source = lane;
  switch (t->kind) {
    case kIndex:
      source = (lane & segment) | (t->argument & ~segment & 31);
      break;
    case kUp:
      if (lane - t->argument >= (lane & segment)) source -= t->argument;
      break;
    case kDown:
      if (lane + t->argument <= last) source += t->argument;
      break;
    case kXor:
      if ((lane ^ t->argument) <= last) source ^= t->argument;
      break;
  }
  if (source < 0 || source >= n || !(t->mask >> source & 1)) {
    return ~uint64_t(0);  // undefined there, poison here
  }
  return first[source].value;
}

bool resolve_group(Thread* first, int n, Thread* t) {
  unsigned int votes = 0;
  for (int i = 0; i < n; ++i) {
    if (!(t->mask >> i & 1)) continue;
    Thread* s = first + i;
    if (s->state == kDone) {
      current = t;
      fail("%s names lane %d in its mask 0x%08x, which has returned",
           kWarpNames[t->kind], i, t->mask);
    }
    if (s->state != kWarp || s->kind != t->kind || s->mask != t->mask) {
      return false;
    }
    if (s->value) votes |= 1u << i;
  }
  const unsigned int present = n == 32 ? t->mask : t->mask & ((1u << n) - 1);
  for (int i = 0; i < n; ++i) {
    if (!(present >> i & 1)) continue;
    Thread* s = first + i;
    switch (s->kind) {
      case kSyncwarp: break;
      case kBallot: s->result = votes; break;
      case kAny: s->result = votes != 0; break;
      case kAll: s->result = votes == present; break;
      default: s->result = shuffled(first, n, s);
    }
  }
  for (int i = 0; i < n; ++i) {
    if (present >> i & 1) first[i].state = kReady;
  }
  if (t->kind == kSyncwarp) ++epochs[(t - threads) / 32];
  return true;
}

bool resolve_warp(int w) {
  Thread* first = threads + 32 * w;
  const int n = n_threads - 32 * w < 32 ? n_threads - 32 * w : 32;
  bool any = false;
  for (int i = 0; i < n; ++i) {
    if (first[i].state == kWarp) any |= resolve_group(first, n, first + i);
  }
  return any;
}

// --------------------------------------------------------------- blocks

// Every thread runs to its next barrier of the block or to its end.
void run_interval() {
  static int order[kMaxThreads], warps[kMaxThreads / 32];
  if (kind_of_schedule == kRandom && (draw() & 1)) {
    arrange(order, n_threads);
    for (bool again = true; again;) {
      for (int i = 0; i < n_threads; ++i) {
        Thread* t = threads + order[i];
        if (can_run(t)) resume(t);
      }
      again = false;
      for (int w = 0; w < n_warps; ++w) again |= resolve_warp(w);
    }
    return;
  }
  // One warp after the other, each as far as it goes.
  arrange(warps, n_warps);
  for (int k = 0; k < n_warps; ++k) {
    const int w = warps[k];
    const int n = n_threads - 32 * w < 32 ? n_threads - 32 * w : 32;
    do {
      arrange(order, n);
      for (int i = 0; i < n; ++i) {
        Thread* t = threads + 32 * w + order[i];
        if (can_run(t)) resume(t);
      }
    } while (resolve_warp(w));
  }
}

void run_block() {
  int i = 0;
  for (unsigned int z = 0; z < blockDim.z; ++z) {
    for (unsigned int y = 0; y < blockDim.y; ++y) {
      for (unsigned int x = 0; x < blockDim.x; ++x, ++i) {
        Thread* t = threads + i;
        t->state = kUnstarted;
        t->lane = i & 31;
        t->index.x = x;
        t->index.y = y;
        t->index.z = z;
      }
    }
  }
  ++block_number;
  last_fence = 0;
  for (;;) {
    ++interval_number;
    run_interval();
    int done = 0, votes = 0;
    Thread* waiting = nullptr;
    for (i = 0; i < n_threads; ++i) {
      Thread* t = threads + i;
      if (t->state == kWarp) {
        current = t;
        fail("%s waits for lanes of its mask 0x%08x that do not execute it",
             kWarpNames[t->kind], t->mask);
      }
      if (t->state == kDone) {
        ++done;
        continue;
      }
      if (waiting && waiting->kind != t->kind) {
        current = t;
        fail("divergent barrier: it waits at %s, others at %s",
             kBarrierNames[t->kind], kBarrierNames[waiting->kind]);
      }
      waiting = t;
      votes += t->value != 0;
    }
    if (!waiting) return;
    if (done) {
      current = waiting;
      fail("divergent barrier: it waits at %s, %d of %d threads have "
           "returned", kBarrierNames[waiting->kind], done, n_threads);
    }
    for (i = 0; i < n_threads; ++i) {
      Thread* t = threads + i;
      t->state = kReady;
      t->result = t->kind == 1   ? votes != 0
                  : t->kind == 2 ? votes == n_threads
                                 : votes;
    }
  }
}

// -------------------------------------------------------------- signals

const int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGVTALRM};
const int kSignalCount = 5;
struct sigaction old_actions[kSignalCount];
alignas(16) char signal_stack[65536];
stack_t old_stack;

void on_signal(int number, siginfo_t* info, void*) {
  if (!running || !pthread_equal(runner, pthread_self())) {
    if (number == SIGVTALRM) {
      if (running) pthread_kill(runner, number);
    } else {
      signal(number, SIG_DFL);  // not ours: let it come again
    }
    return;
  }
  switch (number) {
    case SIGVTALRM: fail("it does not end: the time limit has passed");
    case SIGFPE: fail("integer division by zero");
    case SIGILL: fail("illegal instruction");
    default: fail("illegal memory access at %p", info->si_addr);
  }
}

void set_signals(int64_t milliseconds) {
  stack_t stack;
  memset(&stack, 0, sizeof(stack));
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof(signal_stack);
  sigaltstack(&stack, &old_stack);
  struct sigaction action;
  memset(&action, 0, sizeof(action));
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int i = 0; i < kSignalCount; ++i) {
    sigaction(kSignals[i], &action, &old_actions[i]);
  }
  itimerval timer = {{0, 0}, {milliseconds / 1000,
                              milliseconds % 1000 * 1000}};
  setitimer(ITIMER_VIRTUAL, &timer, nullptr);
}

void reset_signals() {
  itimerval timer = {{0, 0}, {0, 0}};
  setitimer(ITIMER_VIRTUAL, &timer, nullptr);
  for (int i = 0; i < kSignalCount; ++i) {
    sigaction(kSignals[i], &old_actions[i], nullptr);
  }
  sigaltstack(&old_stack, nullptr);
}

// --------------------------------------------------------------- memory

// A variable of shared memory, and unused bytes behind it.
struct Static {
  int64_t address, size, guard;
};

// A stretch of memory that the arguments share.
struct Range {
  int64_t source, size, phase, written_back;
};

// Where an address of the host stands among the arguments.
struct Pointer {
  int64_t slot, range, offset;
};

// A part of a range that the kernel must leave as it is.
struct Constant {
  int64_t range, offset, size;
};

struct Request {
  int64_t thunk, grid[3], block[3], dynamic, statics, n_statics;
  int64_t arguments, n_arguments, pointers, n_pointers, ranges, n_ranges;
  int64_t constants, n_constants, schedule, seed, milliseconds;
  int64_t message, message_size, detail;
};

template <typename T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(address);
}

char** places;
size_t n_places;
int64_t* block_order;
size_t n_block_order;

size_t guard_of(size_t size) {
  return 4096 + (size < 65536 ? size : 65536);
}

template <typename T>
bool grow(T** memory, size_t* have, size_t want) {
  if (want <= *have) return true;
  free(*memory);
  *memory = static_cast<T*>(malloc(want * sizeof(T)));
  *have = *memory ? want : 0;
  return *memory != nullptr;
}

bool copy_in(const Request* q) {
  const Range* ranges = at<Range>(q->ranges);
  size_t total = 512;
  for (int64_t i = 0; i < q->n_ranges; ++i) {
    total += ranges[i].size + 2 * guard_of(ranges[i].size) + 1024;
  }
  if (!grow(&arena, &arena_size, total) ||
      !grow(&places, &n_places, q->n_ranges + 1)) {
    return false;
  }
  memset(arena, 0xff, total);
  uintptr_t p = reinterpret_cast<uintptr_t>(arena);
  for (int64_t i = 0; i < q->n_ranges; ++i) {
    const Range& r = ranges[i];
    const size_t guard = guard_of(r.size);
    p = (p + guard + 511) / 512 * 512 + r.phase;
    places[i] = reinterpret_cast<char*>(p);
    memcpy(places[i], at<char>(r.source), r.size);
    p += r.size + guard;
  }
  return true;
}

enum Verdict {
  kFine, kFault, kBelow, kAbove, kChanged, kReadOnly, kNoMemory
};

// Returns where the first byte is that is not poison, or -1.
int untouched(const char* p, size_t n, bool backwards) {
  if (n && p[0] == static_cast<char>(0xff) && !memcmp(p, p + 1, n - 1)) {
    return -1;
  }
  for (size_t i = 0; i < n; ++i) {
    const size_t k = backwards ? n - 1 - i : i;
    if (p[k] != static_cast<char>(0xff)) return static_cast<int>(i);
  }
  return -1;
}

int copy_out(Request* q) {
  const Range* ranges = at<Range>(q->ranges);
  const Constant* constants = at<Constant>(q->constants);
  int64_t* detail = at<int64_t>(q->detail);
  for (int64_t i = 0; i < q->n_ranges; ++i) {
    const Range& r = ranges[i];
    const int64_t guard = guard_of(r.size);
    detail[0] = i;
    detail[1] = untouched(places[i] - guard, guard, true);
    if (detail[1] >= 0) return kBelow;
    detail[1] = untouched(places[i] + r.size, guard, false);
    if (detail[1] >= 0) return kAbove;
  }
  for (int64_t i = 0; i < q->n_constants; ++i) {
    const Constant& c = constants[i];
    if (memcmp(places[c.range] + c.offset,
               at<char>(ranges[c.range].source + c.offset), c.size)) {
      detail[0] = i;
      return kChanged;
    }
  }
  for (int64_t i = 0; i < q->n_ranges; ++i) {
    const Range& r = ranges[i];
    if (memcmp(places[i], at<char>(r.source), r.size)) {
      if (!r.written_back) {
        detail[0] = i;
        return kReadOnly;
      }
      memcpy(at<char>(r.source), places[i], r.size);
    }
  }
  return kFine;
}

const Request* request;

bool is_of_an_argument(uintptr_t address, size_t size) {
  const Range* ranges = at<Range>(request->ranges);
  for (int64_t i = 0; i < request->n_ranges; ++i) {
    const size_t offset = address - reinterpret_cast<uintptr_t>(places[i]);
    const size_t n = ranges[i].size;
    if (offset < n && size <= n - offset) return true;
  }
  return false;
}

void describe_place(uintptr_t address, char* text, size_t size) {
  const Range* ranges = at<Range>(request->ranges);
  for (int64_t i = 0; i < request->n_ranges; ++i) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(places[i]);
    if (address - start < static_cast<size_t>(ranges[i].size)) {
      snprintf(text, size, "byte %lld of argument {%d}",
               static_cast<long long>(address - start), static_cast<int>(i));
      return;
    }
  }
  const Static* statics = at<Static>(request->statics);
  for (int64_t i = 0; i < request->n_statics; ++i) {
    if (address - statics[i].address < static_cast<size_t>(statics[i].size)) {
      snprintf(text, size, "byte %lld of a shared variable of %lld bytes",
               static_cast<long long>(address - statics[i].address),
               static_cast<long long>(statics[i].size));
      return;
    }
  }
  const uintptr_t start = reinterpret_cast<uintptr_t>(coh_dynamic_shared);
  if (address - start < sizeof(coh_dynamic_shared)) {
    snprintf(text, size, "byte %lld of the dynamic shared memory",
             static_cast<long long>(address - start));
  } else {
    snprintf(text, size, "the memory at %p",
             reinterpret_cast<void*>(address));
  }
}

void run_grid(const Request* q) {
  const int64_t n = q->grid[0] * q->grid[1] * q->grid[2];
  const Static* statics = at<Static>(q->statics);
  arrange(block_order, n);
  for (int64_t k = 0; k < n; ++k) {
    const int64_t b = block_order[k];
    blockIdx.x = static_cast<unsigned int>(b % q->grid[0]);
    blockIdx.y = static_cast<unsigned int>(b / q->grid[0] % q->grid[1]);
    blockIdx.z = static_cast<unsigned int>(b / q->grid[0] / q->grid[1]);
    for (int64_t i = 0; i < q->n_statics; ++i) {
      memset(at<char>(statics[i].address), 0xff,
             statics[i].size + statics[i].guard);
    }
    if (q->dynamic >= 0) {
      memset(coh_dynamic_shared, 0xff, q->dynamic + kDynamicGuard);
    }
    run_block();
    for (int64_t i = 0; i < q->n_statics; ++i) {
      const Static& v = statics[i];
      const int at_byte =
          untouched(at<char>(v.address + v.size), v.guard, false);
      if (at_byte >= 0) {
        fail("block (%u, %u, %u) has written %d bytes behind the end of a "
             "shared variable of %d bytes", blockIdx.x, blockIdx.y,
             blockIdx.z, at_byte + 1, static_cast<int>(v.size));
      }
    }
    if (q->dynamic >= 0) {
      const int at_byte = untouched(
          coh_dynamic_shared + q->dynamic, kDynamicGuard, false);
      if (at_byte >= 0) {
        fail("block (%u, %u, %u) has written %d bytes behind the end of its "
             "dynamic shared memory of %d bytes", blockIdx.x, blockIdx.y,
             blockIdx.z, at_byte + 1, static_cast<int>(q->dynamic));
      }
    }
  }
}

}  // namespace

int flushes;

// Subnormal numbers are zero, with -ftz=true; of float64 as well, here.
void flush_subnormals(bool on) {
#if defined(__x86_64__)
  const unsigned int mode = __builtin_ia32_stmxcsr(), flags = 0x8040;
  __builtin_ia32_ldmxcsr(on ? mode | flags : mode & ~flags);
#elif defined(__aarch64__)
  uint64_t mode;
  const uint64_t flag = 1ull << 24;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  mode = on ? mode | flag : mode & ~flag;
  asm volatile("msr fpcr, %0" : : "r"(mode));
#endif
}

extern "C" {

void coh_flush(int on) { flushes = on; }

uint64_t coh_barrier(int kind, int value) {
  if (!running || !current) return 0;
  Thread* t = current;
  t->value = value != 0;
  wait_here(kBarrier, kind);
  return t->result;
}

uint64_t coh_warp(int kind, unsigned int mask, uint64_t value, int argument,
                  int width) {
  Thread* t = current;
  if (!(mask >> t->lane & 1)) {
    fail("%s is called by lane %d, which its mask 0x%08x does not name",
         kWarpNames[kind], t->lane, mask);
  }
  if (width < 1 || width > 32 || (width & (width - 1))) {
    fail("%s: the width %d is no power of two up to 32", kWarpNames[kind],
         width);
  }
  t->mask = mask;
  t->value = value;
  t->argument = argument;
  t->width = width;
  wait_here(kWarp, kind);
  return t->result;
}

unsigned int coh_active() {
  const int w = static_cast<int>(current - threads) / 32;
  unsigned int mask = 0;
  for (int i = 0; i < 32 && 32 * w + i < n_threads; ++i) {
    if (threads[32 * w + i].state != kDone) mask |= 1u << i;
  }
  return mask;
}

void coh_fail(const char* format, ...) {
  va_list list;
  va_start(list, format);
  vfail(format, list);
}

// What -fsanitize=thread calls at each access of memory.
#define COH_TSAN(n)                                                   \
  void __tsan_read##n(void* p) {                                      \
    access(reinterpret_cast<uintptr_t>(p), n, false, false);          \
  }                                                                   \
  void __tsan_write##n(void* p) {                                     \
    access(reinterpret_cast<uintptr_t>(p), n, true, false);           \
  }                                                                   \
  void __tsan_unaligned_read##n(void* p) { __tsan_read##n(p); }       \
  void __tsan_unaligned_write##n(void* p) { __tsan_write##n(p); }     \
  void __tsan_volatile_read##n(void* p) { __tsan_read##n(p); }        \
  void __tsan_volatile_write##n(void* p) { __tsan_write##n(p); }
COH_TSAN(1)
COH_TSAN(2)
COH_TSAN(4)
COH_TSAN(8)
COH_TSAN(16)
void __tsan_read_range(void* p, size_t n) {
  access(reinterpret_cast<uintptr_t>(p), n, false, false);
}
void __tsan_write_range(void* p, size_t n) {
  access(reinterpret_cast<uintptr_t>(p), n, true, false);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

void coh_atomic(void* p, size_t n) {
  access(reinterpret_cast<uintptr_t>(p), n, true, true);
}

void coh_fence() { last_fence = ++n_fences; }

// What -fsanitize=alignment calls.
void __ubsan_handle_type_mismatch_v1(void* data, uintptr_t address) {
  struct Mismatch {
    const char* file;
    uint32_t line, column;
    const void* type;
    unsigned char log_alignment, kind;
  };
  const Mismatch* m = static_cast<const Mismatch*>(data);
  char place[128];
  describe_place(address, place, sizeof(place));
  coh_fail("line %u: misaligned access: %s is at no multiple of %u bytes",
           m->line, place, 1u << m->log_alignment);
}

// What -fsanitize=bounds calls.
void __ubsan_handle_out_of_bounds(void* data, uintptr_t index) {
  struct Location {
    const char* file;
    uint32_t line, column;
  };
  const Location* l = static_cast<const Location*>(data);
  coh_fail("line %u: index %lld is out of the bounds of an array", l->line,
           static_cast<long long>(static_cast<int32_t>(index)));
}

int coh_launch(Request* q) {
  message = at<char>(q->message);
  message_size = q->message_size;
  message[0] = 0;
  current = nullptr;
  thunk = reinterpret_cast<Thunk>(q->thunk);
  arguments = at<void*>(q->arguments);
  kind_of_schedule = static_cast<int>(q->schedule);
  random_state = q->seed * 0x9e3779b97f4a7c15ull + 0x1234567;
  random_state = (random_state ^ (random_state >> 31)) | 1;
  const int64_t blocks = q->grid[0] * q->grid[1] * q->grid[2];
  if (!make_pool() || !copy_in(q) ||
      !grow(&block_order, &n_block_order, blocks)) {
    return kNoMemory;
  }
  const Pointer* pointers = at<Pointer>(q->pointers);
  for (int64_t i = 0; i < q->n_pointers; ++i) {
    const Pointer& p = pointers[i];
    *at<char*>(p.slot) = places[p.range] + p.offset;
  }
  n_free = 0;
  for (int i = n_made; i > 0; --i) free_stacks[n_free++] = i - 1;
  gridDim.x = static_cast<unsigned int>(q->grid[0]);
  gridDim.y = static_cast<unsigned int>(q->grid[1]);
  gridDim.z = static_cast<unsigned int>(q->grid[2]);
  blockDim.x = static_cast<unsigned int>(q->block[0]);
  blockDim.y = static_cast<unsigned int>(q->block[1]);
  blockDim.z = static_cast<unsigned int>(q->block[2]);
  n_threads = static_cast<int>(q->block[0] * q->block[1] * q->block[2]);
  n_warps = (n_threads + 31) / 32;
  request = q;
  forget_accesses();
  runner = pthread_self();
  set_signals(q->milliseconds);
  int verdict = kFault;
  if (sigsetjmp(main_env, 1) == 0) {
    running = true;
    flush_subnormals(flushes);
    run_grid(q);
    verdict = kFine;
  }
  flush_subnormals(false);
  running = false;
  current = nullptr;
  reset_signals();
  return verdict == kFine ? copy_out(q) : verdict;
}

}  // extern "C"
