/* Pinned threads, their end, and the first failure. */
#include "check.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* Each on a page of its own: they are read in every loop and must not move with what is tested. */
static struct {
	_Alignas(PAGE) atomic_bool time_over;
	_Alignas(PAGE) atomic_int finished; /* members */
	_Alignas(PAGE) atomic_int failed; /* 0, 1: being written, 2: readable */
	_Alignas(PAGE) char text[512];
	char did[256];
} state;

double now(void)
{
	struct timespec at;
	clock_gettime(CLOCK_MONOTONIC, &at);
	return (double)at.tv_sec + (double)at.tv_nsec * 1e-9;
}

bool team_failed(void)
{
	return atomic_load_explicit(&state.failed, memory_order_relaxed) != 0;
}

bool team_stop(void)
{
	return atomic_load_explicit(&state.time_over, memory_order_relaxed) || team_failed();
}

void fail(const char *format, ...)
{
	int none = 0;
	if (!atomic_compare_exchange_strong(&state.failed, &none, 1))
		return;
	va_list args;
	va_start(args, format);
	vsnprintf(state.text, sizeof state.text, format, args);
	va_end(args);
	atomic_store(&state.failed, 2);
}

const char *failure(void)
{
	return atomic_load(&state.failed) == 0 ? NULL : state.text;
}

void failure_clear(void)
{
	atomic_store(&state.failed, 0);
	state.did[0] = 0;
}

void report(const char *format, ...)
{
	va_list args;
	va_start(args, format);
	vsnprintf(state.did, sizeof state.did, format, args);
	va_end(args);
}

const char *reported(void)
{
	return state.did;
}

void expect_cpu(int cpu)
{
	int at = sched_getcpu();
	if (at != cpu)
		fail("a thread pinned to CPU %d runs on CPU %d", cpu, at);
}

void relax(unsigned *spins)
{
	if (++*spins < 2000) {
		__builtin_ia32_pause();
		return;
	}
	struct timespec moment = { 0, 50000 };
	nanosleep(&moment, NULL);
}

void *pages(size_t bytes)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (at == MAP_FAILED) {
		printf("smp-check: FAILED: no memory for %zu bytes: %s\n", bytes, strerror(errno));
		exit(2);
	}
	/* A huge page would be one page to the guest and many to the protocol; small ones are what is tested. */
	madvise(at, bytes, MADV_NOHUGEPAGE);
	return at;
}

struct start {
	struct member *member;
	work body;
};

static void *begin(void *argument)
{
	struct start *start = argument;
	expect_cpu(start->member->cpu);
	start->body(start->member);
	atomic_fetch_add(&state.finished, 1);
	return NULL;
}

bool pairs_left(int *count, int i, double begin)
{
	if (i >= 2 && now() - begin > 10 * scale && i < *count)
		*count = i;
	return i < *count && !team_failed();
}

void team_run(struct member *members, const int *cpus, int count, work body, void *shared, double seconds)
{
	pthread_t threads[MAX_TEAM];
	struct start starts[MAX_TEAM];
	double end = now() + seconds;
	atomic_store(&state.time_over, false);
	atomic_store(&state.finished, 0);
	int started = 0;
	for (; started < count; started++) {
		members[started] = (struct member){ .index = started, .cpu = cpus[started], .shared = shared };
		starts[started] = (struct start){ &members[started], body };
		cpu_set_t set;
		pthread_attr_t attributes;
		CPU_ZERO(&set);
		CPU_SET(cpus[started], &set);
		pthread_attr_init(&attributes);
		pthread_attr_setaffinity_np(&attributes, sizeof set, &set);
		int error = pthread_create(&threads[started], &attributes, begin, &starts[started]);
		pthread_attr_destroy(&attributes);
		if (error) {
			fail("cannot start a thread on CPU %d: %s", cpus[started], strerror(error));
			break;
		}
	}
	while (now() < end && !team_failed() && atomic_load(&state.finished) < started) {
		struct timespec moment = { 0, 10000000 };
		nanosleep(&moment, NULL);
	}
	atomic_store(&state.time_over, true);
	for (int i = 0; i < started; i++)
		pthread_join(threads[i], NULL);
}
