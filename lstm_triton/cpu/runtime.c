// Runs the program instances of a kernel over threads.
//
// Threads come from the OpenMP pool that PyTorch computes with: its workers spin for a while after each operation, so
// a second pool would compete with them for the cores. The pool is asked for as many threads as PyTorch asks for, even
// for fewer programs, because libgomp ends the threads above what the last call asked for, and the next operation
// would have to start them again. What the pool can't give is added as threads of this call alone.

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define CACHE_LINE 64

typedef void kernel_fn(const void *const *args, const int32_t *pid, const int32_t *grid, char *scratch);
typedef void parallel_fn(void (*body)(void *), void *data, unsigned threads, unsigned flags);  // GOMP_parallel
typedef int team_size_fn(void);                                                                // omp_get_num_threads

struct launch {
    kernel_fn *kernel;
    const void *const *args;
    int32_t grid[3];
    int cooperative;
    int64_t programs;
    int64_t threads;  // to bring together, with threads of this call if need be
    size_t scratch_bytes;
    team_size_fn *team_size;
    pthread_t caller;
    _Alignas(CACHE_LINE) _Atomic int64_t ticket;  // the next program, by linear index
    _Alignas(CACHE_LINE) _Atomic int64_t arrived;  // cooperative: programs whose thread is ready
    _Atomic int error;
};

static parallel_fn *openmp_parallel;
static team_size_fn *openmp_team_size;
static pthread_key_t scratch_key;

__attribute__((constructor)) static void initialise(void) {
    pthread_key_create(&scratch_key, free);  // free: at a thread's end
}

// Memory of the calling thread, kept for its next call; NULL if there isn't enough. One cache line before it holds its
// size.
static char *thread_scratch(size_t bytes) {
    char *block = pthread_getspecific(scratch_key);
    size_t have = 0;
    if (block) memcpy(&have, block, sizeof have);
    if (have < bytes) {
        if (bytes > SIZE_MAX / 2) return NULL;
        bytes = (bytes + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
        free(block);
        block = aligned_alloc(CACHE_LINE, CACHE_LINE + bytes);
        if (block) memcpy(block, &bytes, sizeof bytes);
        if (pthread_setspecific(scratch_key, block) != 0) {  // only ever for a thread's first block
            free(block);
            return NULL;
        }
        if (!block) return NULL;
    }
    return block + CACHE_LINE;
}

static void run_program(const struct launch *launch, int64_t index, char *scratch) {
    const int32_t *grid = launch->grid;
    const int32_t pid[3] = {index % grid[0], index / grid[0] % grid[1], index / grid[0] / grid[1]};
    launch->kernel(launch->args, pid, grid, scratch);
}

static int64_t take(struct launch *launch) {
    return atomic_fetch_add_explicit(&launch->ticket, 1, memory_order_relaxed);
}

// What each thread does: programs, until there are none left.
static void work(struct launch *launch) {
    int64_t index = take(launch);
    if (index >= launch->programs) return;
    char *scratch = NULL;
    if (launch->scratch_bytes && !(scratch = thread_scratch(launch->scratch_bytes))) launch->error = ENOMEM;
    if (launch->cooperative) {
        // Programs wait for each other: none may begin if one can't.
        launch->arrived++;
        while (launch->arrived < launch->programs) sched_yield();
    }
    if (launch->error) return;
    for (; index < launch->programs; index = take(launch)) run_program(launch, index, scratch);
}

static void *work_in_thread(void *launch) {
    work(launch);
    return NULL;
}

// What the caller does, as one of `team` threads: starts those that are missing, and joins them.
static void lead(struct launch *launch, int team) {
    int64_t missing = launch->threads - team, started = 0;
    pthread_t *extra = missing > 0 ? malloc(missing * sizeof *extra) : NULL;
    if (extra)
        while (started < missing && pthread_create(&extra[started], NULL, work_in_thread, launch) == 0) started++;
    if (launch->cooperative && started < missing) {
        launch->error = EAGAIN;
        launch->arrived += missing - started;  // so that those who wait see the error
    }
    work(launch);
    while (started) pthread_join(extra[--started], NULL);
    free(extra);
}

static void region(void *data) {
    struct launch *launch = data;
    if (pthread_equal(pthread_self(), launch->caller))
        lead(launch, launch->team_size());
    else
        work(launch);
}

// The functions of PyTorch's OpenMP runtime; NULL for none.
void lstm_triton_use_openmp(parallel_fn *parallel, team_size_fn *team_size) {
    openmp_parallel = parallel;
    openmp_team_size = team_size;
}

// Runs every program of the grid once, x fastest, on up to `threads` threads; cooperative: all at once, each on a
// thread of its own. Returns 0, ENOMEM (no scratch) or EAGAIN (a thread can't be started); after an error some programs
// may not have run, and of cooperative ones none has.
int lstm_triton_run(kernel_fn *kernel, const void *const *args, int32_t x, int32_t y, int32_t z, int threads,
                    size_t scratch_bytes, int cooperative) {
    if (x <= 0 || y <= 0 || z <= 0) return 0;
    struct launch launch = {
        .kernel = kernel,
        .args = args,
        .grid = {x, y, z},
        .programs = (int64_t)x * y * z,
        .scratch_bytes = scratch_bytes,
        .cooperative = cooperative,
    };
    if (launch.programs == 1 || (threads <= 1 && !cooperative)) {
        char *scratch = NULL;
        if (scratch_bytes && !(scratch = thread_scratch(scratch_bytes))) return ENOMEM;
        for (int64_t index = 0; index < launch.programs; index++) run_program(&launch, index, scratch);
        return 0;
    }
    parallel_fn *parallel = threads > 1 ? openmp_parallel : NULL;
    if (cooperative)
        launch.threads = launch.programs;
    else if (!parallel)
        launch.threads = threads < launch.programs ? threads : launch.programs;
    // else what the pool gives is enough: one thread inside another parallel region, as PyTorch's own operations
    launch.team_size = openmp_team_size;
    launch.caller = pthread_self();
    if (parallel)
        parallel(region, &launch, threads, 0);
    else
        lead(&launch, 1);
    return launch.error;
}
