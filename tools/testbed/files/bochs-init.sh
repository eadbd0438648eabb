#!/bin/busybox sh
# Process 1 of an emulated host in Bochs: sets it up, runs the agent on the second serial line, and powers off when the
# agent ends.
/bin/busybox --install -s /bin
export PATH=/gestalt/bin:/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm /root
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
mount -t debugfs debugfs /sys/kernel/debug
mount -t tracefs tracefs /sys/kernel/tracing
hostname h0
ip link set lo up
echo 1 > /proc/sys/vm/unprivileged_userfaultfd
while read -r module; do insmod /modules/$module; done < /modules/order
cd /root
testbed agent --serial /dev/ttyS1
sync
poweroff -f
# Powering off is asynchronous; process 1 must not end before it.
while :; do sleep 1; done
