/*
 * smp-check: does this machine behave as one coherent SMP machine?
 *
 * A static program for a guest with nothing but busybox around. Each test runs threads that are pinned to CPUs of
 * different NUMA nodes, is bounded in time, and either returns what it did or the first wrong value.
 *
 *   smp-check.c   options, the list of tests, their order, the watchdog
 *   topology.c    CPUs and NUMA nodes from sysfs; choosing CPUs
 *   team.c        pinned threads, stopping them, recording the first failure
 *   counters.c    exact counters: lock add, cmpxchg, plain stores side by side in one page
 *   litmus.c      x86-TSO: message passing, store buffering
 *   pingpong.c    futex and pipe ping-pong
 *   memory.c      OpenMP sums, memory of every node written and read from every other
 *
 * Nothing here waits without an end: loops watch team_stop(), blocking calls have timeouts, and the watchdog ends
 * the program (exit code 3) if a test makes no end all the same.
 */
#ifndef CHECK_H
#define CHECK_H

#define _GNU_SOURCE
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PAGE 4096
#define MAX_CPUS 1024
#define MAX_NODES 512
/* Most threads that one test starts: beyond it a test only takes longer. */
#define MAX_TEAM 64

/* A variable with a page to itself, so that two of them are two pages in the coherence protocol. */
struct page {
	volatile uint64_t value;
	char pad[PAGE - sizeof(uint64_t)];
};

/* topology.c */
struct node {
	int id; /* the kernel's number */
	bool has_memory;
	int cpu_count;
	int cpus[MAX_CPUS]; /* the usable ones */
};
extern struct node nodes[MAX_NODES]; /* in the order of their numbers; those without CPUs too */
extern int node_count;
extern int cpu_count;

void topology_read(void);
/* Up to `max` CPUs taken from the nodes in turn. Returns how many. */
int topology_spread(int *cpus, int max);
/* Up to `max` ordered pairs of CPUs on different nodes (both directions), or of one node if there is but one with
 * CPUs. A machine of one CPU gives one pair of that CPU with itself. Returns how many. */
int topology_pairs(int (*pairs)[2], int max);
/* How many different nodes these CPUs are on. */
int topology_nodes_of(const int *cpus, int count);
int topology_node_of(int cpu);

/* team.c */
struct member {
	int index;
	int cpu;
	uint64_t done; /* iterations; written at the member's end */
	void *shared;
};
typedef void (*work)(struct member *);

/*
 * Whether pair `i` of `*count` is to be tried. Where pairs take long, as on emulated hosts, those after the second
 * are left out when the time is up; `*count` says then how many were tried.
 */
bool pairs_left(int *count, int i, double begin);

/* Runs `body` once per CPU, pinned, tells them to stop after `seconds`, and joins them. */
void team_run(struct member *members, const int *cpus, int count, work body, void *shared, double seconds);
/* True when the time is over or something has failed: every loop asks. */
bool team_stop(void);
/* True when another member found something wrong: then nobody waits for anything any more. */
bool team_failed(void);
/* Records the first failure; later ones are ignored. */
__attribute__((format(printf, 1, 2))) void fail(const char *format, ...);
const char *failure(void);
void failure_clear(void);
/* What a test did, for its line. */
__attribute__((format(printf, 1, 2))) void report(const char *format, ...);
const char *reported(void);
/* Fails unless the calling thread runs on `cpu`. */
void expect_cpu(int cpu);
/* One step of a busy wait: polite at first, then asleep, so that emulated CPUs get on. */
void relax(unsigned *spins);
double now(void);
/* Zeroed pages, never freed: a test's pages are its own. */
void *pages(size_t bytes);

/* Multiplies sizes and times; --scale. */
extern double scale;
/* Different in every round of --loop. */
extern uint64_t seed;

/* The tests */
void test_lock_add(void);
void test_cmpxchg(void);
void test_side_by_side(void);
void test_message_passing(void);
void test_store_buffering(void);
void test_futex(void);
void test_pipe(void);
void test_openmp_sum(void);
void test_openmp_reduction(void);
void test_every_node(void);

#endif
