#!/bin/sh
# Runs as root in a Debian on a machine whose nodes have a disk each, with serial numbers s0, s1, ...: uses each disk
# from a CPU of each node, then a file system striped over all of them, and says on standard output what it finds.
#
#   STEP <what>           what happens next
#   FACT <key>=<value>
#   FIO <name> <JSON>     what fio says of a run
#   COUNT <name>          waits for a line of input: then what happened until now has been counted
#   DONE                  all was done
#
# $1: bytes that are verified in each run; $2: bytes of each measured one.
verified=$1 measured=$2

say() { echo "FACT $1=$2"; }
fail() { say failed "$*"; exit 1; }

# on CPU NAME ARGUMENT..: a run of fio whose jobs are threads on this CPU.
on() {
    cpu=$1 name=$2
    shift 2
    fio --thread --cpus_allowed="$cpu" --output-format=json --clocksource=clock_gettime --bs=64k --size="$verified" \
        --verify=crc32c --verify_fatal=1 "$@" > /tmp/fio.json 2> /tmp/fio.messages ||
        fail "fio, $name: $(cat /tmp/fio.messages)"
    echo "FIO $name $(tr -d '\n' < /tmp/fio.json)"
}

# Arguments: bytes, then node:cpu .. -- node:device ..; uses each device from each CPU. One process goes from CPU to CPU,
# so that nothing but reading and writing is counted.
cat > /tmp/measure.py << 'END'
import os, sys, time

BLOCK = 65536

def count(name):
    print("COUNT", name, flush=True)
    sys.stdin.readline()

def use(device, way, size, buffer):
    file = os.open(device, os.O_RDONLY if way == "read" else os.O_WRONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    begin = time.monotonic()
    for at in range(0, size, BLOCK):
        if way == "read":
            os.preadv(file, [buffer], at)
        else:
            os.pwrite(file, buffer, at)
    if way == "write":
        os.fsync(file)
    seconds = time.monotonic() - begin
    os.close(file)
    return seconds

size, rest = int(sys.argv[1]), sys.argv[2:]
split = rest.index("--")
cpus, disks = ([pair.split(":") for pair in pairs] for pairs in (rest[:split], rest[split + 1:]))
buffer = bytearray(os.urandom(BLOCK))
for cpu_node, cpu in cpus:
    print("STEP measuring from a CPU of node", cpu_node, flush=True)
    os.sched_setaffinity(0, {int(cpu)})
    for end in "begin", "end":
        count(f"{cpu_node}.idle.{end}")
    for disk_node, device in disks:
        for way in "read", "write":
            name = f"{cpu_node}.{disk_node}.{way}"
            use(device, way, 2 * BLOCK, buffer)
            count(f"{name}.begin")
            seconds = use(device, way, size, buffer)
            count(f"{name}.end")
            print(f"FACT {name}={seconds}", flush=True)
END

echo "STEP bringing CPUs online that were not started at boot"
for file in /sys/devices/system/cpu/cpu[0-9]*/online; do
    [ ! -e "$file" ] || [ "$(cat "$file")" = 1 ] || echo 1 > "$file" || fail "$file cannot be set"
done
say cpus_online "$(cat /sys/devices/system/cpu/online)"
say kernel "$(uname -r)"
say root "$(findmnt -n -o SOURCE,FSTYPE /)"

cpus='' # node:cpu ...
for dir in /sys/devices/system/node/node[0-9]*; do
    list=$(cat "$dir/cpulist")
    [ -z "$list" ] || cpus="$cpus ${dir##*node}:${list%%[-,]*}"
done
disks='' # node:device ...
for number in 0 1 2 3 4 5 6 7; do
    for dir in /sys/block/vd*; do
        [ "$(cat "$dir/serial")" != "s$number" ] ||
            disks="$disks $(cat "$dir/device/../numa_node"):/dev/${dir##*/}"
    done
done
say cpus "$cpus"
say disks "$disks"

for disk in $disks; do
    for pair in $cpus; do
        echo "STEP a CPU of node ${pair%:*} writes to the disk of node ${disk%:*} and verifies"
        on "${pair#*:}" "${pair%:*}.${disk%:*}.verify" --name=disk --filename="${disk#*:}" --direct=1 --rw=randwrite
    done
done

# shellcheck disable=SC2086 # they are lists
python3 /tmp/measure.py "$measured" $cpus -- $disks || fail "measure.py"

echo "STEP a file system striped over the disks"
devices=$(for disk in $disks; do echo "${disk#*:}"; done)
# shellcheck disable=SC2086
mdadm --create /dev/md0 --run --level=0 --chunk=64 --raid-devices="$(echo "$devices" | wc -l)" $devices \
    > /tmp/mdadm.messages 2>&1 || fail "mdadm: $(cat /tmp/mdadm.messages)"
mkfs.ext4 -q /dev/md0 || fail "mkfs.ext4"
mount /dev/md0 /mnt || fail "mount"
say stripe "$(cat /sys/block/md0/md/level) over $(ls /sys/block/md0/slaves | tr '\n' ' ')"
for pair in $cpus; do
    echo "STEP a CPU of node ${pair%:*} writes a file there"
    on "${pair#*:}" "stripe.${pair%:*}.write" --name=file --filename="/mnt/file${pair%:*}" --rw=write --do_verify=0 \
        --end_fsync=1
done
umount /mnt || fail "umount"
mount /dev/md0 /mnt || fail "mount"
for pair in $cpus; do
    echo "STEP mounted anew, a CPU of node ${pair%:*} verifies all files"
    jobs=''
    for file in $cpus; do
        jobs="$jobs --name=file${file%:*} --filename=/mnt/file${file%:*} --rw=write --verify_only"
    done
    # shellcheck disable=SC2086
    on "${pair#*:}" "stripe.${pair%:*}.verify" $jobs
done
umount /mnt || fail "umount"
mdadm --stop /dev/md0 > /tmp/mdadm.messages 2>&1 || fail "mdadm: $(cat /tmp/mdadm.messages)"
echo "DONE"
