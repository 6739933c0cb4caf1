// Run numbered tasks on a few threads.
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

// GOMP_parallel of the OpenMP runtime that torch uses: run a function on a team of threads.
typedef void (*Team)(void (*run)(void *), void *argument, unsigned threads, unsigned flags);

typedef struct {
    void (*run)(const void *work, int64_t task, int thread);
    const void *work;
    int64_t tasks;
    atomic_llong next_task;
    atomic_int next_thread;
} Job;

static void take_tasks(void *job) {
    Job *j = job;
    int thread = atomic_fetch_add(&j->next_thread, 1);
    for (int64_t task; (task = atomic_fetch_add(&j->next_task, 1)) < j->tasks;) j->run(j->work, task, thread);
}

// Number of threads that pays off for `work` operations if waking one takes as long as `grain` operations.
static int threads_for(int64_t threads, int64_t work, int64_t grain) {
    return (int)(threads <= work / grain ? threads : 1 + work / grain);
}

static void *take_tasks_and_end(void *job) {
    take_tasks(job);
    return NULL;
}

// Call run(work, task, thread) once per task, in any order; a `thread` in [0, threads) runs one task at a time. The
// tasks run on torch's own threads: other threads would have to wait until those stop spinning after torch's last
// operator. Without a team (no OpenMP, or a forked process, where libgomp would hang) threads start and end here.
static void parallel(Team team, int threads, int64_t tasks, void (*run)(const void *, int64_t, int), const void *work) {
    Job job = {.run = run, .work = work, .tasks = tasks};
    if (threads > tasks) threads = (int)tasks;
    if (threads > 1 && team) {
        team(take_tasks, &job, (unsigned)threads, 0);
        return;
    }
    pthread_t helpers[threads > 1 ? threads - 1 : 1];
    int helping = 0;
    while (helping < threads - 1 && pthread_create(&helpers[helping], NULL, take_tasks_and_end, &job) == 0) helping++;
    take_tasks(&job);
    while (helping > 0) pthread_join(helpers[--helping], NULL);
}
