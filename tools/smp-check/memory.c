/* OpenMP over all CPUs, and memory of every NUMA node written and read from every other. */
#include "check.h"

#include <errno.h>
#include <omp.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MPOL_BIND 2

static uint64_t mix(uint64_t x)
{
	x += seed;
	x *= 0x9e3779b97f4a7c15u;
	x ^= x >> 29;
	x *= 0xbf58476d1ce4e5b9u;
	return x ^ x >> 32;
}

/* Pins OpenMP's threads, once per region: libgomp keeps them, but does not promise which is which. */
static void pin(const int *cpus)
{
	cpu_set_t set;
	int cpu = cpus[omp_get_thread_num()];
	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof set, &set) != 0)
		fail("cannot pin an OpenMP thread to CPU %d: %s", cpu, strerror(errno));
	expect_cpu(cpu);
}

/* The main thread takes part in OpenMP's regions; afterwards it may run anywhere again. */
static cpu_set_t before;

static void save_affinity(void)
{
	sched_getaffinity(0, sizeof before, &before);
}

static void restore_affinity(void)
{
	sched_setaffinity(0, sizeof before, &before);
}

void test_openmp_sum(void)
{
	int cpus[MAX_TEAM];
	int count = topology_spread(cpus, MAX_TEAM);
	uint64_t length = (uint64_t)(400000 * scale), regions = 8;
	double begin = now();
	save_affinity();
	uint64_t expected = 0;
	for (uint64_t i = 0; i < length; i++)
		expected += mix(i);
	for (uint64_t region = 0; region < regions && !team_failed(); region++) {
		uint64_t sum = 0;
		int threads = 0;
#pragma omp parallel num_threads(count) reduction(+ : sum, threads)
		{
			threads++;
			pin(cpus);
#pragma omp for schedule(static)
			for (uint64_t i = 0; i < length; i++)
				sum += mix(i);
		}
		if (threads != count)
			fail("OpenMP started %d threads instead of %d", threads, count);
		if (sum != expected)
			fail("region %lu: the sum is %#lx instead of %#lx", region, sum, expected);
	}
	restore_affinity();
	report("%d threads on %d nodes, %lu sums of %lu terms, %.2f s", count, topology_nodes_of(cpus, count),
	       regions, length, now() - begin);
}

/* Why placement could not be asked for or checked; NULL when it was. */
static const char *unplaced;

/* Memory of `count` pages that must come from `node`. */
static uint64_t *pages_on(const struct node *node, size_t count)
{
	uint64_t *at = pages(count * PAGE);
	unsigned long mask[MAX_NODES / 64 + 1] = { 0 };
	mask[node->id / 64] = 1ul << node->id % 64;
	if (node->id < MAX_NODES && syscall(SYS_mbind, at, count * PAGE, MPOL_BIND, mask, (unsigned long)MAX_NODES, 0u)) {
		/* A kernel without NUMA, or a sandbox: then there is nothing to place. Any other error is one. */
		if (errno != ENOSYS && errno != EPERM)
			fail("cannot bind memory to node %d: %s", node->id, strerror(errno));
		unplaced = strerror(errno);
	}
	return at;
}

/* Fails unless every page, all touched by now, is on `node`. */
static void expect_on(const struct node *node, uint64_t *at, size_t count)
{
	for (size_t i = 0; i < count && !unplaced; i++) {
		void *page = (char *)at + i * PAGE;
		int status = -1;
		if (syscall(SYS_move_pages, 0, 1ul, &page, NULL, &status, 0) != 0) {
			if (errno != ENOSYS && errno != EPERM)
				fail("cannot ask where a page is: %s", strerror(errno));
			unplaced = strerror(errno);
		} else if (status != node->id) {
			fail("page %zu of memory bound to node %d is on node %d", i, node->id, status);
			return;
		}
	}
}

static int with_memory(const struct node **found)
{
	int count = 0;
	for (int i = 0; i < node_count; i++)
		if (nodes[i].has_memory)
			found[count++] = &nodes[i];
	return count;
}

static void report_placed(const char *format, int a, size_t b, int c, double seconds)
{
	char did[200];
	snprintf(did, sizeof did, format, a, b, c, seconds);
	report("%s%s%s", did, unplaced ? "; placement not checked: " : "", unplaced ? unplaced : "");
}

void test_openmp_reduction(void)
{
	const struct node *places[MAX_NODES];
	uint64_t *slices[MAX_NODES];
	int cpus[MAX_TEAM];
	int count = topology_spread(cpus, MAX_TEAM), place_count = with_memory(places);
	/* 1 MiB in all at scale 1, at least 4 pages on each node. */
	size_t slice_pages = (size_t)(256 * scale) / (size_t)place_count;
	if (slice_pages < 4)
		slice_pages = 4;
	size_t words = slice_pages * PAGE / 8;
	double begin = now();
	unplaced = NULL;
	save_affinity();
	for (int i = 0; i < place_count; i++)
		slices[i] = pages_on(places[i], slice_pages);
	uint64_t expected = 0;
	for (uint64_t i = 0; i < words * (uint64_t)place_count; i++)
		expected += mix(i);
	/* Pages go round the threads, so that each thread meets every node, and other pages when it reads. */
	size_t total = slice_pages * (size_t)place_count;
	uint64_t sum = 0;
#pragma omp parallel num_threads(count)
	{
		pin(cpus);
#pragma omp for schedule(static, 1)
		for (size_t page = 0; page < total; page++)
			for (size_t i = 0; i < PAGE / 8; i++) {
				size_t word = page % slice_pages * (PAGE / 8) + i;
				slices[page / slice_pages][word] = mix(page / slice_pages * words + word);
			}
#pragma omp for schedule(static) reduction(+ : sum)
		for (size_t page = 0; page < total; page++)
			for (size_t i = 0; i < PAGE / 8; i++)
				sum += slices[page / slice_pages][page % slice_pages * (PAGE / 8) + i];
	}
	restore_affinity();
	if (sum != expected)
		fail("the sum over all nodes' memory is %#lx instead of %#lx", sum, expected);
	for (int i = 0; i < place_count; i++)
		expect_on(places[i], slices[i], slice_pages);
	report_placed("%d threads, %zu pages on each of %d nodes, %.2f s", count, slice_pages, place_count,
		      now() - begin);
}

struct exchange {
	int place_count;
	size_t pages;
	uint64_t step; /* differs with every writing */
	uint64_t *slices[MAX_NODES];
};

static uint64_t pattern(const struct exchange *all, int slice, size_t word)
{
	return mix(all->step << 48 ^ (uint64_t)slice << 32 ^ word);
}

static void write_all(struct member *member)
{
	struct exchange *all = member->shared;
	for (int slice = 0; slice < all->place_count && !team_failed(); slice++)
		for (size_t word = 0; word < all->pages * PAGE / 8; word++)
			all->slices[slice][word] = pattern(all, slice, word);
}

static void read_all(struct member *member)
{
	struct exchange *all = member->shared;
	for (int slice = 0; slice < all->place_count && !team_failed(); slice++) {
		uint64_t sum = 0, expected = 0;
		for (size_t word = 0; word < all->pages * PAGE / 8; word++) {
			uint64_t value = ((volatile uint64_t *)all->slices[slice])[word];
			sum = sum * 31 + value;
			expected = expected * 31 + pattern(all, slice, word);
			if (value != pattern(all, slice, word)) {
				fail("CPU %d, slice %d, word %zu: read %#lx instead of %#lx (writing %lu)",
				     member->cpu, slice, word, value, pattern(all, slice, word), all->step);
				return;
			}
		}
		if (sum != expected)
			fail("CPU %d, slice %d: the checksum differs", member->cpu, slice);
	}
}

void test_every_node(void)
{
	const struct node *places[MAX_NODES], *populated[MAX_NODES];
	int place_count = with_memory(places), sides = 0;
	for (int i = 0; i < node_count && sides < MAX_TEAM; i++)
		if (nodes[i].cpu_count > 0)
			populated[sides++] = &nodes[i];
	struct exchange *all = pages(sizeof *all);
	/* Every writing moves all pages once to the writer and once to each reader: keep the product in bounds. */
	all->pages = (size_t)(256 * scale) / (size_t)(sides * place_count);
	if (all->pages < 4)
		all->pages = 4;
	all->place_count = place_count;
	double begin = now();
	unplaced = NULL;
	for (int i = 0; i < place_count; i++)
		all->slices[i] = pages_on(places[i], all->pages);
	for (int writer = 0; writer < sides && !team_failed(); writer++) {
		struct member members[MAX_TEAM];
		int cpus[MAX_TEAM];
		all->step = (uint64_t)writer + 1;
		/* Different CPUs of a node take their turn. */
		for (int i = 0; i < sides; i++)
			cpus[i] = populated[i]->cpus[writer % populated[i]->cpu_count];
		team_run(members, &cpus[writer], 1, write_all, all, 0);
		team_run(members, cpus, sides, read_all, all, 0);
	}
	for (int i = 0; i < place_count; i++)
		expect_on(places[i], all->slices[i], all->pages);
	report_placed("%d writers, each read by all, %zu pages on each of %d nodes, %.2f s", sides, all->pages,
		      place_count, now() - begin);
}
