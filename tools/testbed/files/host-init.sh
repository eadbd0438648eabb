#!/bin/sh
# Process 1 of an emulated host: sets it up, runs the agent, and powers off when the agent ends.
# On the kernel command line: gestalt.host, its number from 0; gestalt.mtu, of its networks in bytes; gestalt.rdma=1
# for an RDMA device on each.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
for word in $(cat /proc/cmdline); do
    case $word in
        gestalt.host=*) host=${word#*=} ;;
        gestalt.mtu=*) mtu=${word#*=} ;;
        gestalt.rdma=*) rdma=${word#*=} ;;
    esac
done
mkdir -p /dev/pts /dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null
echo "h$host" > /proc/sys/kernel/hostname
echo "127.0.0.1 localhost h$host" > /etc/hosts
echo 1 > /proc/sys/vm/unprivileged_userfaultfd
# Nested virtualization inside the emulated one would only cost time.
modprobe kvm_amd nested=0
ip link set lo up
for interface in /sys/class/net/eth*; do
    [ -e "$interface" ] || continue
    name=${interface##*/}
    network=${name#eth}
    ip link set "$name" mtu "$mtu" up
    ip address add "10.$((77 + network)).0.$((host + 1))/24" dev "$name"
    if [ "$rdma" = 1 ]; then
        modprobe rdma_rxe
        rdma link add "rxe$network" type rxe netdev "$name"
    fi
done
# From here on the programs need no trip to the outside to be paged in.
cp /gestalt/bin/* /usr/local/bin/
cd /root || exit 1
# No guest may run on CPU 0, and so no program does. In QEMU's TCG every CPU's restore of x87 state clears a bit in flag
# word hflags2 of CPU 0 (cpu_clear_ignne), without a lock. When that meets a VMRUN or VMEXIT of CPU 0, the word's bit for
# nested paging is lost or comes back, and the guest ends in a triple fault or runs on with the host's registers.
taskset -p -c "1-$(($(nproc --all) - 1))" $$ > /dev/null || exit 1
testbed agent
sync
echo o > /proc/sysrq-trigger
# Powering off is asynchronous; process 1 must not end before it.
while :; do sleep 1; done
