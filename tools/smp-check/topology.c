/* CPUs and NUMA nodes, read from sysfs. */
#include "check.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct node nodes[MAX_NODES];
int node_count;
int cpu_count;

/* Calls `each` for every number of a list like "0-3,8". False if the file cannot be read. */
static bool read_list(const char *path, void (*each)(int number, void *context), void *context)
{
	char text[8192];
	FILE *file = fopen(path, "r");
	if (!file)
		return false;
	size_t length = fread(text, 1, sizeof text - 1, file);
	fclose(file);
	text[length] = 0;
	char *at = text;
	while (*at >= '0' && *at <= '9') {
		long first = strtol(at, &at, 10), last = first;
		if (*at == '-')
			last = strtol(at + 1, &at, 10);
		for (long number = first; number <= last; number++)
			each((int)number, context);
		if (*at == ',')
			at++;
	}
	return true;
}

static cpu_set_t allowed;

static void add_cpu(int cpu, void *context)
{
	struct node *node = context;
	if (cpu < CPU_SETSIZE && CPU_ISSET(cpu, &allowed) && node->cpu_count < MAX_CPUS) {
		node->cpus[node->cpu_count++] = cpu;
		cpu_count++;
	}
}

static void add_node(int id, void *context)
{
	(void)context;
	if (node_count == MAX_NODES)
		return;
	char path[96];
	struct node *node = &nodes[node_count++];
	node->id = id;
	snprintf(path, sizeof path, "/sys/devices/system/node/node%d/cpulist", id);
	read_list(path, add_cpu, node);
}

static void mark_memory(int id, void *context)
{
	(void)context;
	for (int i = 0; i < node_count; i++)
		if (nodes[i].id == id)
			nodes[i].has_memory = true;
}

void topology_read(void)
{
	CPU_ZERO(&allowed);
	if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) {
		perror("smp-check: sched_getaffinity");
		exit(2);
	}
	bool numa = read_list("/sys/devices/system/node/online", add_node, NULL) && cpu_count > 0;
	if (numa)
		numa = read_list("/sys/devices/system/node/has_memory", mark_memory, NULL);
	if (!numa) {
		/* A kernel without NUMA: one node with everything. */
		memset(nodes, 0, sizeof nodes[0]);
		node_count = 1;
		cpu_count = 0;
		nodes[0].has_memory = true;
		for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
			add_cpu(cpu, &nodes[0]);
	}
}

int topology_spread(int *cpus, int max)
{
	int count = 0;
	for (int turn = 0; turn < MAX_CPUS && count < max && count < cpu_count; turn++)
		for (int i = 0; i < node_count && count < max; i++)
			if (turn < nodes[i].cpu_count)
				cpus[count++] = nodes[i].cpus[turn];
	return count;
}

int topology_pairs(int (*pairs)[2], int max)
{
	int with_cpus[MAX_NODES], populated = 0, count = 0;
	for (int i = 0; i < node_count; i++)
		if (nodes[i].cpu_count > 0)
			with_cpus[populated++] = i;
	/* Neighbours first, then those farther apart, so that a small `max` still meets every node. */
	for (int distance = 1; distance < populated && count < max; distance++) {
		for (int i = 0; i < populated && count < max; i++) {
			pairs[count][0] = nodes[with_cpus[i]].cpus[0];
			/* The last CPU of the other: not only the first ones are met. */
			const struct node *other = &nodes[with_cpus[(i + distance) % populated]];
			pairs[count][1] = other->cpus[other->cpu_count - 1];
			count++;
		}
	}
	if (count == 0) {
		const struct node *node = &nodes[with_cpus[0]];
		pairs[0][0] = node->cpus[0];
		pairs[0][1] = node->cpus[node->cpu_count - 1];
		count = 1;
	}
	return count;
}

int topology_node_of(int cpu)
{
	for (int i = 0; i < node_count; i++)
		for (int j = 0; j < nodes[i].cpu_count; j++)
			if (nodes[i].cpus[j] == cpu)
				return nodes[i].id;
	return -1;
}

int topology_nodes_of(const int *cpus, int count)
{
	int different = 0;
	for (int i = 0; i < count; i++) {
		bool seen = false;
		for (int j = 0; j < i && !seen; j++)
			seen = topology_node_of(cpus[j]) == topology_node_of(cpus[i]);
		different += !seen;
	}
	return different;
}
