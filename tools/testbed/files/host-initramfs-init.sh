#!/bin/busybox sh
# /init of an emulated host's initramfs: mounts the image read-only below a tmpfs, and the stage, and goes on in them.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
while read -r module; do insmod "/modules/$module"; done < /modules/order
mkdir -p /image /changes /root
mount -t ext4 -o ro /dev/vda /image
mount -t tmpfs -o size=80% changes /changes
mkdir /changes/upper /changes/work
mount -t overlay -o lowerdir=/image,upperdir=/changes/upper,workdir=/changes/work root /root
mkdir -p /root/gestalt
mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,cache=none stage /root/gestalt
for dir in proc sys dev; do mount --move /$dir /root/$dir; done
exec switch_root /root /gestalt/host-init
