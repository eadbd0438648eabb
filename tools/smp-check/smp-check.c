/*
 * smp-check [--scale X] [--loop SECONDS]
 *
 * Prints one line per test and a last one for all. Exit code: 0 all ok, 1 a test failed, 2 it cannot run here,
 * 3 a test made no end.
 */
#include "check.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

double scale = 1;
uint64_t seed;

static const struct {
	const char *name;
	void (*run)(void);
} tests[] = {
	{ "lock-add", test_lock_add },
	{ "cmpxchg", test_cmpxchg },
	{ "side-by-side-stores", test_side_by_side },
	{ "message-passing", test_message_passing },
	{ "store-buffering", test_store_buffering },
	{ "futex-ping-pong", test_futex },
	{ "pipe-ping-pong", test_pipe },
	{ "openmp-sum", test_openmp_sum },
	{ "openmp-reduction-over-nodes", test_openmp_reduction },
	{ "memory-of-every-node", test_every_node },
};
#define TESTS (int)(sizeof tests / sizeof tests[0])

static const char *_Atomic running;
static atomic_int running_for; /* half seconds */

/* Ends the program when a test does not. */
static void *watch(void *argument)
{
	(void)argument;
	int limit = (int)(2 * (90 + 10 * scale));
	for (;;) {
		struct timespec half = { 0, 500000000 };
		nanosleep(&half, NULL);
		if (atomic_load(&running) && atomic_fetch_add(&running_for, 1) >= limit) {
			printf("smp-check: %s: FAILED: no end after %d s\nsmp-check: FAILED\n", atomic_load(&running),
			       limit / 2);
			fflush(stdout);
			_exit(3);
		}
	}
	return NULL;
}

/* The one test to run; all if NULL. */
static const char *only;

static int usage(void)
{
	fprintf(stderr, "usage: smp-check [--scale X] [--loop SECONDS] [--only TEST]\n"
			"  --scale X       sizes and times of the tests, above 0; 1 when not given\n"
			"  --loop SECONDS  repeat all tests until so much time has passed\n"
			"  --only TEST     run this one:");
	for (int i = 0; i < TESTS; i++)
		fprintf(stderr, " %s", tests[i].name);
	fprintf(stderr, "\n");
	return 2;
}

static bool known(const char *name)
{
	for (int i = 0; i < TESTS; i++)
		if (strcmp(tests[i].name, name) == 0)
			return true;
	return false;
}

/* Runs all tests once. Returns how many failed. */
static int round_of_tests(bool quiet)
{
	int failed = 0;
	for (int i = 0; i < TESTS; i++) {
		if (only && strcmp(only, tests[i].name) != 0)
			continue;
		failure_clear();
		atomic_store(&running_for, 0);
		atomic_store(&running, tests[i].name);
		tests[i].run();
		atomic_store(&running, NULL);
		if (failure()) {
			failed++;
			printf("smp-check: %s: FAILED: %s\n", tests[i].name, failure());
		} else if (!quiet) {
			printf("smp-check: %s: ok (%s)\n", tests[i].name, reported());
		}
	}
	return failed;
}

int main(int argc, char **argv)
{
	double loop = 0;
	for (int i = 1; i < argc; i++) {
		char *end = NULL;
		double *option = NULL;
		if (strcmp(argv[i], "--only") == 0) {
			if (++i == argc || !known(argv[i]))
				return usage();
			only = argv[i];
			continue;
		}
		if (strcmp(argv[i], "--scale") == 0)
			option = &scale;
		else if (strcmp(argv[i], "--loop") == 0)
			option = &loop;
		if (!option || ++i == argc)
			return usage();
		*option = strtod(argv[i], &end);
		if (end == argv[i] || *end || !(*option > 0 && *option < 1e6))
			return usage();
	}
	/* libgomp reads these before main: threads that spin at barriers would starve emulated CPUs. */
	if (!getenv("OMP_WAIT_POLICY")) {
		setenv("OMP_WAIT_POLICY", "passive", 1);
		setenv("OMP_DYNAMIC", "false", 1);
		setenv("OMP_PROC_BIND", "false", 1);
		execv("/proc/self/exe", argv);
		/* Without /proc it is slower, not wrong. */
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	topology_read();
	pthread_t watchdog;
	if (pthread_create(&watchdog, NULL, watch, NULL) != 0) {
		printf("smp-check: FAILED: cannot start a thread\n");
		return 2;
	}
	int memory_nodes = 0;
	for (int i = 0; i < node_count; i++)
		memory_nodes += nodes[i].has_memory;
	printf("smp-check: %d CPUs, %d NUMA nodes, %d with memory\n", cpu_count, node_count, memory_nodes);
	double end = now() + loop;
	int rounds = 0, failed = 0;
	do {
		seed = (uint64_t)rounds * 1000003;
		failed = round_of_tests(rounds > 0);
		rounds++;
	} while (!failed && now() < end);
	if (failed)
		printf("smp-check: FAILED (%d of %d tests, round %d)\n", failed, only ? 1 : TESTS, rounds);
	else
		printf("smp-check: all ok (%d tests, %d rounds)\n", only ? 1 : TESTS, rounds);
	return failed ? 1 : 0;
}
