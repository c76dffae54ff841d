// Threads that share out pieces of work. The caller takes pieces too, and never waits for a thread
// that has not begun one: on a busy machine a thread may come milliseconds late, and finds nothing.
//
//     share_out(part, work, count, piece, threads);      part(work, first, last) over 0 .. count
//
// The threads are made at the first call, sleep in between, and are made anew after a fork.

#ifndef INLAY_POOL_H
#define INLAY_POOL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <unistd.h>

#define MOST_THREADS 64

typedef void (*Part)(const void *work, int64_t first, int64_t last);

typedef struct {
    Part part;
    const void *work;
    int64_t count, piece;
    _Atomic int64_t next;
    int wanted, users;  // threads that may still join; those that are in it now
} Job;

static struct {
    pthread_mutex_t lock;
    pthread_cond_t wake, left;
    Job *job;
    int threads;
    pid_t owner;
} pool = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, PTHREAD_COND_INITIALIZER, 0, 0, 0};

static void take_pieces(Job *job) {
    for (;;) {
        const int64_t first = atomic_fetch_add(&job->next, job->piece);
        if (first >= job->count) return;
        const int64_t last = first + job->piece;
        job->part(job->work, first, last < job->count ? last : job->count);
    }
}

static void *pool_thread(void *nothing) {
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (!pool.job || pool.job->wanted == 0) pthread_cond_wait(&pool.wake, &pool.lock);
        Job *job = pool.job;
        job->wanted--;
        job->users++;
        pthread_mutex_unlock(&pool.lock);
        take_pieces(job);
        pthread_mutex_lock(&pool.lock);
        if (--job->users == 0) pthread_cond_signal(&pool.left);
    }
    return nothing;
}

// With the lock held: let there be `threads` beside the caller, as far as the system gives them.
static void grow_pool(int threads) {
    if (pool.owner != getpid()) {  // after a fork the threads are the parent's
        pool.owner = getpid();
        pool.threads = 0;
    }
    for (; pool.threads < threads; pool.threads++) {
        pthread_t thread;
        if (pthread_create(&thread, 0, pool_thread, 0)) return;
        pthread_detach(thread);
    }
}

static void share_out(Part part, const void *work, int64_t count, int64_t piece, int threads) {
    if (piece < 1) piece = 1;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    // a caller that finds the pool at work, or its lock held by a fork's parent, does all itself
    if (threads < 2 || count <= piece || pthread_mutex_trylock(&pool.lock)) {
        part(work, 0, count);
        return;
    }
    if (pool.job && pool.owner == getpid()) {
        pthread_mutex_unlock(&pool.lock);
        part(work, 0, count);
        return;
    }
    grow_pool(threads - 1);
    Job job = {.part = part, .work = work, .count = count, .piece = piece, .wanted = threads - 1};
    pool.job = &job;
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    take_pieces(&job);
    pthread_mutex_lock(&pool.lock);
    pool.job = 0;
    while (job.users) pthread_cond_wait(&pool.left, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
}

#endif
