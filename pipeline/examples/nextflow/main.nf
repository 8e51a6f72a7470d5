// Slides to report: teachers cached in parts, one store, a student, a benchmark.
//
//   nextflow run main.nf -profile slurm --manifest slides.csv --teacher h-optimus-0 --student hibou-l
//
// The manifest is a CSV with a column path. Its paths are absolute, because every process has a folder of its own.
// g2l ends with 1 if single slides failed, which are named in the log of their process: that is no failure here.
nextflow.enable.dsl = 2

params.manifest = 'slides.csv'
params.teacher = 'h-optimus-0'
params.student = 'hibou-l'
params.tasks = "${projectDir}/tasks.toml"
params.slides_per_part = 50
params.views = 2
params.outdir = 'results'

process CACHE_TEACHER {
    tag "${manifest.baseName}"
    label 'gpu'

    input:
    path manifest

    output:
    path "${manifest.baseName}.zarr"

    script:
    """
    g2l cache-teacher ${manifest} --store ${manifest.baseName}.zarr --teacher ${params.teacher} \\
        --views ${params.views} --workers ${task.cpus} --no-pictures || [ \$? -eq 1 ]
    """

    stub:
    """
    mkdir ${manifest.baseName}.zarr
    """
}

process MERGE {
    input:
    path parts

    output:
    path 'store.zarr'

    script:
    """
    g2l store merge ${parts} --out store.zarr
    """

    stub:
    """
    mkdir store.zarr
    """
}

process DISTILL {
    label 'gpu'
    publishDir params.outdir, mode: 'copy'

    input:
    path store

    output:
    path 'run'

    script:
    """
    g2l distill --store ${store} --teacher ${params.teacher} --student ${params.student} \\
        --workers ${task.cpus} --out run
    """

    stub:
    """
    mkdir run
    """
}

// Embeds into a copy without the augmented views: what another process has made is not changed.
process BENCH {
    label 'gpu'
    publishDir params.outdir, mode: 'copy'

    input:
    path store
    path run
    path manifest
    path tasks

    output:
    path 'report'

    script:
    """
    g2l store subset ${store} bench.zarr --views 1
    g2l embed ${manifest} --store bench.zarr --encoder ${run} --encoder ${params.student} \\
        --workers ${task.cpus} || [ \$? -eq 1 ]
    g2l bench ${tasks} --store bench.zarr --encoders ${params.teacher},${params.student},G2L=${run} --out report
    """

    stub:
    """
    mkdir report
    """
}

workflow {
    manifest = file(params.manifest, checkIfExists: true)
    parts = Channel.of(manifest).splitText(by: params.slides_per_part, keepHeader: true, file: true)
    MERGE(CACHE_TEACHER(parts).collect())
    DISTILL(MERGE.out)
    BENCH(MERGE.out, DISTILL.out, manifest, file(params.tasks, checkIfExists: true))
}
