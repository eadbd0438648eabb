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
# $1: bytes that are verified in each run; $2 and $3: bytes of the smaller and the larger measured run.
verified=$1 small=$2 large=$3

say() { echo "FACT $1=$2"; }
fail() { say failed "$*"; exit 1; }
count() { echo "COUNT $1"; read -r _ || exit 1; }

# on CPU NAME ARGUMENT..: a run of fio whose work is done on this CPU.
on() {
    cpu=$1 name=$2
    shift 2
    fio --name=check --cpus_allowed="$cpu" --output-format=json --clocksource=clock_gettime --bs=64k "$@" \
        > /tmp/fio.json 2> /tmp/fio.messages || fail "fio, $name: $(cat /tmp/fio.messages)"
    echo "FIO $name $(tr -d '\n' < /tmp/fio.json)"
}

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
    device=${disk#*:}
    for pair in $cpus; do
        cpu=${pair#*:} name="${pair%:*}.${disk%:*}"
        echo "STEP a CPU of node ${pair%:*} uses the disk of node ${disk%:*}"
        on "$cpu" "$name.verify" --filename="$device" --direct=1 --rw=randwrite --size="$verified" \
            --verify=crc32c --do_verify=1 --verify_fatal=1
        for way in read write; do
            for size in "$small" "$large"; do
                count "$name.$way.$size.begin"
                on "$cpu" "$name.$way.$size" --filename="$device" --rw="$way" --size="$size" --end_fsync=1
                count "$name.$way.$size.end"
            done
        done
    done
done

echo "STEP a file system striped over the disks"
devices=$(for disk in $disks; do echo "${disk#*:}"; done)
mdadm --create /dev/md0 --run --level=0 --chunk=64 --raid-devices="$(echo "$devices" | wc -l)" $devices \
    > /tmp/mdadm.messages 2>&1 || fail "mdadm: $(cat /tmp/mdadm.messages)"
mkfs.ext4 -q /dev/md0 || fail "mkfs.ext4"
mount /dev/md0 /mnt || fail "mount"
say stripe "$(cat /sys/block/md0/md/level) over $(ls /sys/block/md0/slaves | tr '\n' ' ')"
for pair in $cpus; do
    on "${pair#*:}" "stripe.${pair%:*}.write" --filename="/mnt/file${pair%:*}" --rw=write --size="$verified" \
        --verify=crc32c --do_verify=0 --end_fsync=1
done
echo "STEP the same file system, mounted anew"
umount /mnt || fail "umount"
mount /dev/md0 /mnt || fail "mount"
for pair in $cpus; do
    for file in $cpus; do
        on "${pair#*:}" "stripe.${pair%:*}.${file%:*}.verify" --filename="/mnt/file${file%:*}" --rw=write \
            --size="$verified" --verify=crc32c --verify_only --verify_fatal=1
    done
done
umount /mnt || fail "umount"
mdadm --stop /dev/md0 > /tmp/mdadm.messages 2>&1 || fail "mdadm: $(cat /tmp/mdadm.messages)"
echo "DONE"
