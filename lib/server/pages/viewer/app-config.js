/* Configuration of the OHIF viewer inside MONAI Label's package, and what this server adds to it:
 *   - brush, eraser and the list of segments in the MONAI Label mode, so that a prediction can be corrected,
 *   - Submit, which sends the segmentation back as the label of the series that it was made of,
 *   - the series that "Next Sample" named, where the viewer itself would open the first one of its study.
 * OHIF joins `extensions` to its own when it starts; docs: https://docs.ohif.org/configuration/configurationFiles */
(function () {
  'use strict';

  // where the server is: "" at the root of a host, or the path that a proxy puts before it
  const BASE = new URL(document.currentScript.src).pathname.replace(/\/ohif\/app-config\.js$/, '');
  const MONAI_LABEL_MODE = 'monai-label';
  const TOOL_GROUPS = ['default', 'mpr', 'SRToolGroup'];
  const SEGMENTATION_PANEL = '@ohif/extension-cornerstone.panelModule.panelSegmentationWithTools';
  const ELEMENT_TYPES = { Uint8Array: 'uint8', Uint16Array: 'uint16', Int16Array: 'int16', Float32Array: 'float' };

  const isLabelMode = () => window.location.pathname.split('/').includes(MONAI_LABEL_MODE);

  /** What the viewer reads when it starts: its panel talks to the server that it comes from, on whatever port. */
  async function prepare({ servicesManager }) {
    listenToInferences(servicesManager.services);
    document.cookie = 'MONAILABEL_SERVER_URL=' + encodeURIComponent(window.location.origin + BASE + '/');
    const style = document.createElement('style'); // the panel writes its progress in white on white
    style.textContent = '.monaiLabelPanel .w3-center { color: #04225b; text-align: center; }';
    document.head.append(style);
    await openNamedSeries();
  }

  /** What the server says of the series of a study: which is to be opened, and which have a regular one beside them. */
  async function seriesToOpen(study) {
    const answer = await fetch(BASE + '/ohif/series?study=' + encodeURIComponent(study));
    return answer.ok ? answer.json() : { SeriesInstanceUID: '', regular: {} };
  }

  /** Add to the address the series that was handed out last in the study that it names. */
  async function openNamedSeries() {
    const address = new URL(window.location.href);
    const study = address.searchParams.get('StudyInstanceUIDs');
    if (!isLabelMode() || !study || address.searchParams.has('SeriesInstanceUIDs')) {
      return;
    }
    const named = (await seriesToOpen(study)).SeriesInstanceUID;
    if (named) {
      address.searchParams.set('SeriesInstanceUIDs', named);
      window.history.replaceState(null, '', address);
    }
  }

  /** Model of the last inference, by series: what a segmentation that is submitted was made with. */
  const modelOf = {};

  /** Hear of the panel's inferences: it shows neither why one failed nor what the server warns of. */
  function listenToInferences(services) {
    const open = XMLHttpRequest.prototype.open;
    XMLHttpRequest.prototype.open = function (method, address, ...options) {
      const asked = new URL(address, window.location.href);
      const [, model] = asked.pathname.match(/\/infer\/([^/]+)\/?$/) || [];
      if (model) {
        this.addEventListener('load', () => tellOfInference(services, decodeURIComponent(model), asked, this));
      }
      return open.call(this, method, address, ...options);
    };
  }

  function tellOfInference(services, model, asked, answer) {
    const say = (message, type) =>
      services.uiNotificationService.show({ title: 'MONAI Label - ' + model, message, type, duration: 15000 });
    if (answer.status === 200) {
      modelOf[asked.searchParams.get('image')] = model;
      const warnings = answer.getResponseHeader('X-Warnings');
      if (warnings) {
        say(decodeURIComponent(warnings), 'warning');
      }
      return;
    }
    try {
      const body = answer.response;
      const text = typeof body === 'string' ? body : new TextDecoder().decode(body);
      say(JSON.parse(text).detail, 'error');
    } catch (error) {
      say('The server answered ' + answer.status, 'error');
    }
  }

  const BRUSH_PART = 0.04; // radius of the brush, of the shorter side of a slice
  const [SMALLEST_MM, LARGEST_MM, STEP_MM] = [0.5, 10, 0.5];

  /** The brush's radius for a series, in steps of its slider; undefined where the size of a pixel is not known. */
  function brushRadius(set) {
    const { Rows, Columns, PixelSpacing } = (set.instances && set.instances[0]) || {};
    if (!Rows || !Columns || !PixelSpacing) {
      return undefined;
    }
    const side = Math.min(Rows * Number(PixelSpacing[0]), Columns * Number(PixelSpacing[1]));
    const radius = Math.round((side * BRUSH_PART) / STEP_MM) * STEP_MM;
    return Math.min(LARGEST_MM, Math.max(SMALLEST_MM, radius));
  }

  /** Give brush and eraser, and the sliders that show it, a radius that fits the series; once for each series. */
  function fitBrush({ servicesManager, commandsManager }) {
    const { displaySetService, toolbarService, cornerstoneViewportService } = servicesManager.services;
    let fitted;
    const { unsubscribe } = cornerstoneViewportService.subscribe(
      cornerstoneViewportService.EVENTS.VIEWPORT_DATA_CHANGED,
      () => {
        const set = displaySetService.getActiveDisplaySets().find(one => brushRadius(one));
        if (!set || fitted === set.SeriesInstanceUID) {
          return;
        }
        fitted = set.SeriesInstanceUID;
        const value = brushRadius(set);
        commandsManager.runCommand('setBrushSize', { value, toolNames: [] });
        for (const button of Object.values(toolbarService.getButtons() || {})) {
          const options = (button.props && button.props.options) || [];
          options.filter(option => /-radius$/.test(option.id)).forEach(option => (option.value = value));
        }
      }
    );
    return unsubscribe;
  }

  const SMALLEST_TILT_DEGREES = 0.5;

  /** The angle between the way from the first to the last slice and the normal of the slices, in degrees. */
  function tiltDegrees(instances) {
    const [first, last] = [instances[0], instances[instances.length - 1]];
    if (first === last || !first.ImageOrientationPatient || !first.ImagePositionPatient || !last.ImagePositionPatient) {
      return 0;
    }
    const [a, b, c, d, e, f] = Array.from(first.ImageOrientationPatient, Number);
    const normal = [b * f - c * e, c * d - a * f, a * e - b * d];
    const way = [0, 1, 2].map(axis => Number(last.ImagePositionPatient[axis]) - Number(first.ImagePositionPatient[axis]));
    const length = Math.hypot(...way);
    const along = Math.abs(normal.reduce((sum, part, axis) => sum + part * way[axis], 0));
    return length ? (Math.acos(Math.min(1, along / length)) * 180) / Math.PI : 0;
  }

  /** Why the viewer cannot show a series as the volume that the server segments; "" where it can. */
  function whyNotShown(set, regular) {
    const instead = regular
      ? ' Open the series "' + regular + '" of this study instead: Run and Submit work on it.'
      : ' The server can segment it all the same: use 3D Slicer, or its REST interface.';
    if (set.isReconstructable === false) {
      return 'OHIF cannot show this series as a volume (a localizer, doubled, missing or uneven slices), so that Run does nothing here.' + instead;
    }
    const tilt = tiltDegrees(set.instances);
    return tilt > SMALLEST_TILT_DEGREES || / \(regular: upright/.test(regular)
      ? 'The slices of this series are tilted by ' + tilt.toFixed(1) + ' degrees. OHIF stacks them upright, so that what is drawn here cannot be submitted.' + instead
      : '';
  }

  /** Say of each series that is opened what the viewer, which stays black or shows it skewed, does not. */
  function explainSeries({ servicesManager }) {
    const { displaySetService, uiNotificationService } = servicesManager.services;
    const explain = async set => {
      const regular = (await seriesToOpen(set.StudyInstanceUID)).regular[set.SeriesInstanceUID];
      const message = whyNotShown(set, regular);
      if (message) {
        const title = set.SeriesDescription || 'Series ' + set.SeriesNumber;
        uiNotificationService.show({ title, message, type: 'warning', duration: 60000 });
      }
    };
    const { unsubscribe } = displaySetService.subscribe(displaySetService.EVENTS.DISPLAY_SETS_ADDED, added => {
      for (const set of added.displaySetsAdded || []) {
        if (set.Modality !== 'SEG' && set.instances && set.instances.length > 1) {
          explain(set);
        }
      }
    });
    return unsubscribe;
  }

  const paintTool = (id, icon, label, toolName) => ({
    id,
    uiType: 'ohif.radioGroup',
    props: {
      icon,
      label,
      commands: { commandName: 'setToolActiveToolbar', commandOptions: { toolName, toolGroupIds: TOOL_GROUPS } },
      evaluate: {
        name: 'evaluate.cornerstone.segmentation',
        toolNames: [toolName],
        disabledText: 'Connect to MONAI Label first, or open a segmentation.',
      },
    },
  });

  const BUTTONS = [
    paintTool('UnetrBrush', 'icon-tool-brush', 'Brush', 'CircularBrush'),
    paintTool('UnetrEraser', 'icon-tool-eraser', 'Eraser', 'CircularEraser'),
    {
      id: 'UnetrSubmit',
      uiType: 'ohif.radioGroup',
      props: {
        icon: 'icon-upload',
        label: 'Submit the segmentation as label',
        commands: 'submitLabel',
        evaluate: 'evaluate.action',
      },
    },
  ];

  /** The segmentation that is active in the active viewport, or else the only one. */
  function activeSegmentation(services) {
    const { viewportGridService, segmentationService } = services;
    const viewport = viewportGridService.getActiveViewportId();
    const active = segmentationService.getActiveSegmentation(viewport);
    return active || segmentationService.getSegmentations()[0];
  }

  /** The series that a segmentation was made of, by the image that its first labelmap image refers to. */
  function seriesOf(services, volume) {
    const { displaySetService, viewportGridService } = services;
    const sets = displaySetService.getActiveDisplaySets();
    const id = String(volume.referencedVolumeId || '');
    const named = sets.find(set => set.instances && id.includes(set.displaySetInstanceUID));
    if (named) {
      return named.SeriesInstanceUID;
    }
    const { viewports, activeViewportId } = viewportGridService.getState();
    const shown = viewports.get(activeViewportId).displaySetInstanceUIDs.map(uid => displaySetService.getDisplaySetByUID(uid));
    const image = shown.find(set => set && set.Modality !== 'SEG') || shown[0];
    return image.SeriesInstanceUID;
  }

  /** A labelmap as NRRD with a raw body, in the patient's coordinates. */
  function asNrrd(volume) {
    const voxels = volume.voxelManager.getCompleteScalarDataArray();
    const type = ELEMENT_TYPES[voxels.constructor.name];
    const axis = number => volume.direction.slice(3 * number, 3 * number + 3).map(part => part * volume.spacing[number]);
    const vector = parts => '(' + Array.from(parts).join(',') + ')';
    const header = [
      'NRRD0004',
      'type: ' + type,
      'dimension: 3',
      'space: left-posterior-superior',
      'sizes: ' + Array.from(volume.dimensions).join(' '),
      'space directions: ' + [0, 1, 2].map(number => vector(axis(number))).join(' '),
      'kinds: domain domain domain',
      'endian: little',
      'encoding: raw',
      'space origin: ' + vector(volume.origin),
    ].join('\n');
    return new Blob([header, '\n\n', voxels], { type: 'application/octet-stream' });
  }

  /** Send the active segmentation as the final label of its series; the server's own sentence says what was wrong. */
  async function submitLabel(services) {
    const say = (message, type) =>
      services.uiNotificationService.show({ title: 'Submit label', message, type, duration: 8000 });
    try {
      const segmentation = activeSegmentation(services);
      if (!segmentation) {
        throw new Error('There is no segmentation yet: press Run, or open one.');
      }
      const volume = services.segmentationService.getLabelmapVolume(segmentation.segmentationId);
      const series = seriesOf(services, volume);
      // without empty segments: the list has the labels of every model, and any that the user added and left
      const drawn = new Uint8Array(65536);
      volume.voxelManager.getCompleteScalarDataArray().forEach(value => (drawn[value] = 1));
      const segments = Object.values(segmentation.segments).filter(segment => segment && drawn[segment.segmentIndex]);
      const info = segments.map(segment => ({ name: segment.label, idx: segment.segmentIndex }));
      const model = modelOf[series] ? { model: modelOf[series] } : {};
      const form = new FormData();
      form.append('params', JSON.stringify({ label_info: info, ...model }));
      form.append('label', asNrrd(volume), 'label.nrrd');
      const address = BASE + '/datastore/label?tag=final&image=' + encodeURIComponent(series);
      const answer = await fetch(address, { method: 'PUT', body: form });
      const told = await answer.json();
      if (!answer.ok) {
        throw new Error(told.detail || 'The server answered ' + answer.status);
      }
      say('The segmentation is now the label of this series.', 'success');
      return told;
    } catch (error) {
      say(String(error.message || error), 'error');
      return undefined;
    }
  }

  let stopListening = () => undefined;

  const extension = {
    id: 'monailabel-unetr',
    preRegistration: prepare,
    getCommandsModule: ({ servicesManager }) => ({
      definitions: { submitLabel: { commandFn: () => submitLabel(servicesManager.services) } },
      defaultContext: 'DEFAULT',
    }),
    onModeEnter: ({ servicesManager, commandsManager }) => {
      if (!isLabelMode()) {
        return;
      }
      const stops = [fitBrush({ servicesManager, commandsManager }), explainSeries({ servicesManager })];
      stopListening = () => stops.forEach(stop => stop());
      const { toolbarService, panelService } = servicesManager.services;
      toolbarService.addButtons(BUTTONS);
      toolbarService.createButtonSection('primary', BUTTONS.map(button => button.id));
      // the mode adds its own panel when its layout is drawn, after this
      setTimeout(() => panelService.addPanel('right', SEGMENTATION_PANEL), 0);
    },
    onModeExit: () => stopListening(),
  };

  window.config = {
    routerBasename: BASE + '/ohif/',
    showStudyList: true,
    extensions: [extension],
    modes: [],
    showWarningMessageForCrossOrigin: true,
    showCPUFallbackMessage: true,
    showLoadingIndicator: true,
    strictZSpacingForVolumeViewport: true,
    useSharedArrayBuffer: 'FALSE',
    defaultDataSourceName: 'dicomweb',
    dataSources: [
      {
        namespace: '@ohif/extension-default.dataSourcesModule.dicomweb',
        sourceName: 'dicomweb',
        configuration: {
          friendlyName: 'Studies of this server',
          name: 'studies',
          wadoUriRoot: BASE + '/dicom-web',
          qidoRoot: BASE + '/dicom-web',
          wadoRoot: BASE + '/dicom-web',
          qidoSupportsIncludeField: true,
          supportsReject: false,
          imageRendering: 'wadors',
          thumbnailRendering: 'wadors',
          enableStudyLazyLoad: true,
          supportsFuzzyMatching: true,
          supportsWildcard: true,
          dicomUploadEnabled: true,
          bulkDataURI: { enabled: false },
        },
      },
    ],
  };
})();
