#!/bin/busybox sh
# /init of the guest: says what the guest sees, in lines that the testbed parses, and does what `gestalt.run=` on the
# kernel command line lists: online, report, drivers, devices, disks, network, hotplug=ROUNDS,
# throughput=BYTES, fill, occupy, vacate, smp-check, loop-smp-check, ask, shell, poweroff, reboot.
#
#   GESTALT-MARK <event>           something happened now
#   GESTALT-REPORT <key>=<value>   a fact
#   GESTALT-ASK                    the next line of input is an action, or `sh <command>`
/bin/busybox --install -s /bin
export PATH=/bin HOME=/ TERM=linux
echo "GESTALT-MARK userspace"
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
hostname guest
# Or the kernel reports each time that caches are dropped, in the middle of what is said here.
echo 4 > /proc/sys/vm/drop_caches

# CPUs that the kernel was told (maxcpus=) not to start by itself.
online() {
    for file in /sys/devices/system/cpu/cpu[0-9]*/online; do
        [ ! -e "$file" ] || [ "$(cat "$file")" = 1 ] || echo 1 > "$file"
    done
    echo "GESTALT-MARK online"
}

say() { echo "GESTALT-REPORT $1=$2"; }

report() {
    say kernel "$(uname -r)"
    for word in $(cat /proc/cmdline); do
        case $word in gestalt.from=*) say booted_from "${word#*=}" ;; esac
    done
    say cpus_online "$(grep -c ^processor /proc/cpuinfo)"
    say cpus_online_list "$(cat /sys/devices/system/cpu/online)"
    say cpus_present_list "$(cat /sys/devices/system/cpu/present)"
    say mem_total_kib "$(awk '/^MemTotal:/ { print $2 }' /proc/meminfo)"
    say clocksource "$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
    nodes=0
    for dir in /sys/devices/system/node/node[0-9]*; do
        [ -d "$dir" ] || continue
        n=${dir##*node}
        nodes=$((nodes + 1))
        say "node$n.cpus" "$(cat "$dir/cpulist")"
        say "node$n.mem_total_kib" "$(awk '/MemTotal:/ { print $4 }' "$dir/meminfo")"
        say "node$n.distance" "$(cat "$dir/distance")"
    done
    say numa_nodes "$nodes"
    say uptime "$(cut -d' ' -f1 /proc/uptime)"
}

# The drivers of virtio devices that this kernel has as modules.
drivers() {
    dir=/modules/$(uname -r)
    while read -r module; do insmod "$dir/$module.ko" || say driver_failed "$module"; done < "$dir/order"
    echo "GESTALT-MARK drivers"
}

# What is on the PCI buses, and which NUMA node each device is near to.
devices() {
    for dir in /sys/bus/pci/devices/*; do
        [ -d "$dir" ] || continue
        say "pci.${dir##*/}" "$(cat "$dir/vendor"):$(cat "$dir/device") node $(cat "$dir/numa_node")"
    done
    for dir in /sys/block/vd*; do
        [ -d "$dir" ] || continue
        name=$(cat "$dir/serial")
        say "$name.name" "${dir##*/}"
        say "$name.sectors" "$(cat "$dir/size")"
        say "$name.queues" "$(ls "$dir/mq" | wc -l)"
        say "$name.numa_node" "$(cat "$dir/device/../numa_node")"
    done
    grep virtio /proc/interrupts
}

# Writes to every disk from a CPU of every node, and reads it back from a CPU of every node.
disks() {
    failed=
    for dir in /sys/block/vd*; do
        [ -d "$dir" ] || continue
        disk=${dir##*/}
        at=0
        for from in /sys/devices/system/node/node[0-9]*; do
            writer=$(sed 's/[-,].*//' "$from/cpulist")
            [ -n "$writer" ] || continue
            at=$((at + 1))
            taskset -c "$writer" dd if=/dev/urandom of=/tmp/written bs=64k count=16 2>/dev/null
            taskset -c "$writer" dd if=/tmp/written of="/dev/$disk" bs=64k seek=$((at * 16)) conv=fsync 2>/dev/null ||
                failed="$failed $disk:write"
            for to in /sys/devices/system/node/node[0-9]*; do
                reader=$(sed 's/[-,].*//' "$to/cpulist")
                [ -n "$reader" ] || continue
                echo 3 > /proc/sys/vm/drop_caches
                taskset -c "$reader" dd if="/dev/$disk" of=/tmp/read bs=64k skip=$((at * 16)) count=16 2>/dev/null
                cmp -s /tmp/written /tmp/read && continue
                wrong=$(cmp -l /tmp/written /tmp/read | awk 'NR == 1 { first = $1 } END { print NR " bytes from " first }')
                echo 3 > /proc/sys/vm/drop_caches
                dd if="/dev/$disk" of=/tmp/read bs=64k skip=$((at * 16)) count=16 2>/dev/null
                cmp -s /tmp/written /tmp/read && again=right || again=wrong
                failed="$failed $disk: written by $writer, read by $reader: $wrong, then $again;"
            done
        done
        say "$disk.patterns" "$at"
    done
    rm -f /tmp/written /tmp/read
    if [ -z "$failed" ]; then say disks ok; else say disks "failed:$failed"; fi
}

# Reaches the host through every network card, from a CPU of every node, with packets of several fragments.
network() {
    for dir in /sys/class/net/e*; do
        [ -d "$dir" ] || continue
        card=${dir##*/}
        index=$((0x$(sed 's/.*://' "$dir/address")))
        ip link set "$card" up
        ip addr add "10.9.$index.2/24" dev "$card"
        failed=
        for node in /sys/devices/system/node/node[0-9]*; do
            cpu=$(sed 's/[-,].*//' "$node/cpulist")
            [ -n "$cpu" ] || continue
            taskset -c "$cpu" ping -c 3 -W 10 -s 4000 "10.9.$index.1" || failed="$failed $cpu"
        done
        say "card$index" "${failed:-ok} node $(cat "$dir/device/../numa_node")"
    done
}

# How long it takes to move so many bytes ($1) from and to every disk and through every network card, from a CPU of every
# node, three times each. The host sends so many from port 5002 and takes any on port 5001.
throughput() {
    # Nothing to read, and no end.
    mkfifo /tmp/never
    for node in /sys/devices/system/node/node[0-9]*; do
        cpu=$(sed 's/[-,].*//' "$node/cpulist")
        [ -n "$cpu" ] || continue
        from=${node##*/}
        # What is sent is in this node's memory.
        taskset -c "$cpu" dd if=/dev/urandom of=/tmp/data bs=64k count=$(($1 / 65536)) 2>/dev/null
        for dir in /sys/block/vd*; do
            [ -d "$dir" ] || continue
            disk=/dev/${dir##*/}
            for round in 1 2 3; do
                echo "GESTALT-MARK $from-$disk-$round"
                seconds "$from.disk.$(cat "$dir/serial").write.$round" "$cpu" "dd if=/tmp/data of=$disk bs=64k conv=fsync"
                echo 1 > /proc/sys/vm/drop_caches
                seconds "$from.disk.$(cat "$dir/serial").read.$round" "$cpu" "dd if=$disk of=/dev/null bs=64k count=$(($1 / 65536))"
            done
        done
        for dir in /sys/class/net/e*; do
            [ -d "$dir" ] || continue
            index=$((0x$(sed 's/.*://' "$dir/address")))
            ip link set "${dir##*/}" up
            ip addr add "10.9.$index.2/24" dev "${dir##*/}" 2>/dev/null
            for round in 1 2 3; do
                echo "GESTALT-MARK $from-card$index-$round"
                seconds "$from.card.$index.send.$round" "$cpu" "nc 10.9.$index.1 5001 < /tmp/data"
                seconds "$from.card.$index.receive.$round" "$cpu" "nc 10.9.$index.1 5002 0<>/tmp/never > /tmp/got"
                [ "$(stat -c %s /tmp/got)" = "$1" ] || say throughput_failed "card $index, receive"
            done
        done
    done
    rm /tmp/data /tmp/got /tmp/never
    say throughput done
}

# Runs command $3 on CPU $2 and says as $1 how many seconds it took.
seconds() {
    took=$(taskset -c "$2" sh -c 'read begin _ < /proc/uptime; eval "$1" > /dev/null 2>&1 || exit 1
        read end _ < /proc/uptime; echo "$begin $end"' sh "$3") || took=
    [ -z "$took" ] || say "$1" "$(echo "$took" | awk '{ print $2 - $1 }')"
}

# Fills half of the free memory from a CPU of the first node, and reads it back in turn from one of every node.
fill() {
    mkdir -p /fill
    mount -t tmpfs -o size=100% fill /fill
    yes gestalt | dd of=/tmp/text bs=64k count=16 iflag=fullblock 2>/dev/null
    pieces=$(awk '/^MemAvailable:/ { print int($2 / 1024 / 16 / 2) }' /proc/meminfo)
    # Sixteen times the text, and its number.
    echo 'for i in 1 2 3 4; do cat /tmp/text /tmp/text /tmp/text /tmp/text; done; echo "$1"' > /tmp/piece
    failed= readers=
    for number in $(seq "$pieces"); do
        taskset -c 0 sh /tmp/piece "$number" > "/fill/$number" || failed="$failed write:$number"
        echo "GESTALT-MARK wrote-$number-of-$pieces"
    done
    for node in /sys/devices/system/node/node[0-9]*; do
        readers="$readers $(sed 's/[-,].*//' "$node/cpulist")"
    done
    set -- $readers
    for number in $(seq "$pieces"); do
        wanted=$(taskset -c "$1" sh -c "sh /tmp/piece $number | md5sum")
        [ "$wanted" = "$(taskset -c "$1" md5sum < "/fill/$number")" ] || failed="$failed $1:$number"
        echo "GESTALT-MARK read-$number-of-$pieces-by-$1"
        set -- "$@" "$1"
        shift
    done
    umount /fill
    rm /tmp/text /tmp/piece
    say fill_mib "$((pieces * 16))"
    if [ -z "$failed" ]; then say fill ok; else say fill "wrong:$failed"; fi
}

# Takes memory of every node.
occupy() {
    for dir in /sys/devices/system/node/node[0-9]*; do
        node=${dir##*node}
        mkdir -p "/occupied/$node"
        mount -t tmpfs -o "mpol=bind:$node" occupied "/occupied/$node"
        yes occupied | dd of="/occupied/$node/file" bs=1M count=64 iflag=fullblock 2>/dev/null
    done
    echo "GESTALT-MARK occupied"
}

# Frees it, and gives the balloon time: the kernel reports two seconds later, piece by piece.
vacate() {
    rm /occupied/*/file
    sleep 12
    echo "GESTALT-MARK vacated"
}

# Waits until the disk with serial number $1 is there ($2 = 1), and what it is called, or gone ($2 = 0); 60 s at most.
await_disk() {
    for tenth in $(seq 600); do
        disk=$(grep -lx "$1" /sys/block/vd*/serial 2>/dev/null | cut -d/ -f4)
        [ -z "$disk" ]
        [ $? != "$2" ] || return 0
        sleep 0.1
    done
    return 1
}

# Writes to disk s0 and compares what it reads back, until there is a file /tmp/enough.
busy() {
    count=0
    wrong=0
    await_disk s0 1
    s0=$disk
    while [ ! -e /tmp/enough ]; do
        count=$((count + 1))
        dd if=/dev/urandom of=/tmp/busy bs=64k count=4 2>/dev/null
        dd if=/tmp/busy of="/dev/$s0" bs=64k seek=$((count % 32)) conv=fsync 2>/dev/null
        echo 1 > /proc/sys/vm/drop_caches
        dd if="/dev/$s0" of=/tmp/busy-read bs=64k skip=$((count % 32)) count=4 2>/dev/null
        cmp -s /tmp/busy /tmp/busy-read || wrong=$((wrong + 1))
    done
    say busy "$count writes, $wrong wrong"
}

# A disk called hot comes and goes so many times, and then a network card, while another disk is busy. What was written
# to it is still there when it comes again. Whoever watches the marks adds and removes them.
hotplug() {
    busy & worker=$!
    failed=
    for round in $(seq "$1"); do
        echo "GESTALT-MARK want$round"
        await_disk hot 1 || { failed="$failed $round: it did not come;"; break; }
        say "hot.node$round" "$(cat "/sys/block/$disk/device/../numa_node")"
        if [ "$round" -gt 1 ]; then
            dd if="/dev/$disk" of=/tmp/hot-read bs=64k count=4 2>/dev/null
            cmp -s /tmp/hot /tmp/hot-read || failed="$failed $round: it lost what was written;"
        fi
        dd if=/dev/urandom of=/tmp/hot bs=64k count=4 2>/dev/null
        dd if=/tmp/hot of="/dev/$disk" bs=64k 2>/dev/null || failed="$failed $round: it could not be written;"
        sync
        echo "GESTALT-MARK used$round"
        await_disk hot 0 || { failed="$failed $round: it did not go;"; break; }
    done
    echo "GESTALT-MARK want-card"
    for tenth in $(seq 600); do
        card=$(grep -lx 02:00:00:00:00:63 /sys/class/net/*/address | cut -d/ -f5)
        [ -z "$card" ] || break
        sleep 0.1
    done
    ip link set "$card" up
    ip addr add 10.9.99.2/24 dev "$card"
    ping -c 3 -W 10 10.9.99.1 || failed="$failed the card does not reach its host;"
    echo "GESTALT-MARK used-card"
    for tenth in $(seq 600); do
        [ -e "/sys/class/net/$card" ] || break
        sleep 0.1
    done
    [ ! -e "/sys/class/net/$card" ] || failed="$failed the card did not go;"
    touch /tmp/enough
    wait $worker
    if [ -z "$failed" ]; then say hotplug ok; else say hotplug "failed:$failed"; fi
}

check() {
    if smp-check "$@"; then say smp_check ok; else say smp_check failed; fi
}

act() {
    case $1 in
        online) online ;;
        report) report ;;
        drivers) drivers ;;
        devices) devices ;;
        disks) disks ;;
        network) network ;;
        fill) fill ;;
        throughput=*) throughput "${1#*=}" ;;
        occupy) occupy ;;
        vacate) vacate ;;
        hotplug=*) hotplug "${1#*=}" ;;
        smp-check) check ;;
        loop-smp-check) while check; do :; done ;;
        ask) ask ;;
        # A terminal of its own, so that Ctrl-C reaches what runs in the shell and not this script.
        shell) setsid cttyhack sh -l ;;
        poweroff) echo "GESTALT-MARK poweroff"; poweroff -f ;;
        reboot) echo "GESTALT-MARK reboot"; reboot -f ;;
        'sh '*) eval "${1#sh }"; say status $? ;;
        *) echo "GESTALT-REPORT unknown_action=$1" ;;
    esac
}

# Whoever has the console decides what happens next. Nobody there within two minutes: power off.
ask() {
    while echo GESTALT-ASK && read -r -t 120 line; do act "$line"; done
}

actions=report,shell
for word in $(cat /proc/cmdline); do
    case $word in gestalt.run=*) actions=${word#*=} ;; esac
done
IFS=,
for action in $actions; do
    unset IFS
    act "$action"
    IFS=,
done
# Process 1 may not end.
act poweroff
while :; do sleep 1; done
